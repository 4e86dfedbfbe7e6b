#!/bin/sh
# The main job on drawn parts, set-up included. Everything it makes is in demo/ and .venv/.
set -eu
cd "$(dirname "$0")/.."
. tools/venv.sh
prepare build
exec "$python" -m stpm.tools.demo "$@"
