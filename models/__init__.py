"""Patch encoders and slide models: ``nn.Module`` only, no files, no csv, no slides."""
