#!/bin/sh
# Lint, types and tests, set-up included. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
. tools/venv.sh
prepare dev
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy -p stpm.edge -p stpm.calibration -p stpm.build -p stpm.tools
exec "$python" -m pytest "$@"
