#!/bin/sh
# Removes from the environment $1 what the images never run: tests, headers, and the parts of pyarrow for S3 and Flight.
set -eu
cd "$1"/lib/python3.*/site-packages
find numpy pyarrow -type d -name tests -prune -exec rm -rf {} +
rm -rf pyarrow/include pyarrow/src torch/include
rm -f pyarrow/_flight.* pyarrow/libarrow_flight.* pyarrow/libarrow_python_flight.*
rm -f pyarrow/_s3fs.* pyarrow/libarrow_s3.*
# Copies of libarrow_python*.so.NNNN, the only names that anything links to.
rm -f pyarrow/libarrow_python*.so pyarrow/libarrow_python*.so.*.*.*
find . -type f \( -name '*.a' -o -name '*.pxd' -o -name '*.pyx' \) -delete
