#!/usr/bin/env bash
# Patches, features and splits, the same as CLAM's.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx/settings.sh

bash scripts/clam/1_create_patches.sh
bash scripts/clam/2_extract_features.sh "$@"
bash scripts/clam/3_create_splits.sh
