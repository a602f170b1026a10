#!/usr/bin/env bash
# Heatmaps and GeoJSON; copy heatmaps/configs/demo_streaming.yaml and edit it for your slides.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/streaming/settings.sh

CONFIG=${CONFIG:-demo_streaming.yaml}
$PYTHON create_heatmaps.py --config_file "$CONFIG" --yes "$@"
