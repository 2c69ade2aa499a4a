#!/usr/bin/env bash
# From nothing to samples: installs into .venv, then prepares text, trains on 4 local ranks, converts and samples.
#   bash launch/quickstart.sh [--steps N] [--out DIR] [--grid tp=1,dp=2]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/install.sh"
exec "$root/.venv/bin/python" "$root/launch/quickstart.py" "$@"
