"""Helpers around the six scripts: numbered shell recipes, the demo cohort, presets."""
