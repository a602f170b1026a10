#!/usr/bin/env bash
# Heatmaps and GeoJSON; copy heatmaps/configs/config_template.yaml and edit it for your slides.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/clam/settings.sh

CONFIG=${CONFIG:-demo/heatmap.yaml}
$PYTHON create_heatmaps.py --config_file "$CONFIG" --yes "$@"
