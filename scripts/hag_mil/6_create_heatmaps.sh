#!/usr/bin/env bash
# Attention of each level with the patches it looked into outlined, and GeoJSON; copy
# heatmaps/configs/demo_hag_mil.yaml and edit it for your slides.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/hag_mil/settings.sh

CONFIG=${CONFIG:-demo_hag_mil.yaml}
$PYTHON create_heatmaps.py --config_file "$CONFIG" --yes "$@"
