#!/usr/bin/env bash
# Heatmaps and GeoJSON; copy heatmaps/configs/demo_abmilx_e2e.yaml and edit it for your slides.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx_e2e/settings.sh

CONFIG=${CONFIG:-demo_abmilx_e2e.yaml}
$PYTHON create_heatmaps.py --config_file "$CONFIG" --yes "$@"
