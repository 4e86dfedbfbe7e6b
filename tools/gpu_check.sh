#!/bin/sh
# Proves the GPU part on this machine: tests, kernels, CUDA graphs, TensorRT and what it is faster than, as JSON.
#
#     sh tools/gpu_check.sh [BUNDLE...]
#
# Without bundles it trains small ones on drawn parts: latency does not depend on how good they are. With PYTHON set,
# that interpreter is used as it is, for machines without network; otherwise .venv is filled. The figures go to
# gpu-check.json, in $OUT where that is set. RUNS is the number of frames per latency. Ends with 0 when nothing failed,
# 1 when something did, and 5 where there is no GPU.
set -eu
no_gpu() {
    echo "gpu_check: $1" >&2
    exit 5
}
here=$PWD
from_here() { # where a path of the caller's leads
    case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac
}
case ${PYTHON:-} in */*) PYTHON=$(from_here "$PYTHON") ;; esac

# before anything is installed for a GPU that is not there
"${PYTHON:-python3}" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null ||
    no_gpu "this machine has no NVIDIA driver (libcuda.so.1 does not load): run it on one with an NVIDIA GPU"

cd "$(dirname "$0")/.."
root=$PWD
if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
    if ! "$python" -c 'import stpm.edge' 2>/dev/null; then
        # not installed there: links stand in for it
        mkdir -p .cache/links/stpm
        for name in edge build calibration tools; do ln -sfn "$root/$name" ".cache/links/stpm/$name"; done
        PYTHONPATH="$root/.cache/links${PYTHONPATH:+:$PYTHONPATH}"
        export PYTHONPATH
    fi
else
    . tools/venv.sh
    prepare dev
    ( prepare tensorrt ) || {
        echo "TensorRT cannot be installed: what needs it is skipped; pycuda alone is tried" >&2
        "$python" -m pip install --quiet --disable-pip-version-check pycuda ||
            no_gpu "pycuda cannot be installed: it is compiled on the spot, with nvcc and a C++ compiler on PATH"
    }
fi

"$python" -m stpm.tools.gpu_check --probe || exit $?

small=.cache/gpu-check
if [ $# = 0 ]; then
    echo "training small networks on drawn parts, for their size only"
    "$python" -m stpm.tools.parts --out "$small/data" --good 16 --test 4 || true  # its absence is seen below
    for precision in fp16 int8; do
        if "$python" -m stpm.build.cli --engine $precision --category bushing --data "$small/data" --teacher builtin \
            --epochs 2 --batch 8 --qad-epochs 1 --max-drop 1,1,1 --work "$small/work" --out "$small/$precision"; then
            set -- "$@" "$root/$small/$precision"
        else
            echo "no $precision bundle can be built here: what needs one is skipped; give bundles as arguments" >&2
        fi
    done
fi

for bundle; do
    # at the end as an option, and away from the front
    set -- "$@" --bundle "$(from_here "$bundle")"
    shift
done
out=$(from_here "${OUT:-$root}")
mkdir -p "$out"
"$python" -m stpm.tools.gpu_check "$@" --runs "${RUNS:-300}" --json "$out/gpu-check.json"
