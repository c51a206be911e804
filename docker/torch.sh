#!/bin/sh
# Installs torch, without what it needs, from TORCH_INDEX into the environment $1. CUDA=1 allows one that brings CUDA.
set -eu
pip --python "$1/bin/python" install --no-cache-dir --constraint constraints.txt --no-deps --index-url "$TORCH_INDEX" torch || {
    echo "torch: none from TORCH_INDEX=$TORCH_INDEX that fits constraints.txt; build with another index," \
        "--build-arg TORCH_INDEX=URL: docker/README.md, 'Other indexes'" >&2
    exit 1
}
version=$("$1/bin/python" -c 'import glob, runpy, sys
[path] = glob.glob(sys.prefix + "/lib/python3*/site-packages/torch/version.py")
print(runpy.run_path(path)["cuda"] or "")')
[ -z "$version" ] || [ "${CUDA:-}" = 1 ] || {
    echo "torch: TORCH_INDEX=$TORCH_INDEX has a build with CUDA $version, which brings gigabytes of libraries; build with" \
        "an index of builds for the CPU, --build-arg TORCH_INDEX=URL, or allow it, --build-arg CUDA=1" >&2
    exit 1
}
