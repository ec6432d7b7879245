#!/usr/bin/env bash
# Builds emoe/_C_emulated: the CUDA part with its kernels on the fake runtime of the tests. Needs CUDA's headers.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -G Ninja -S . -B build/emulated -DPython_EXECUTABLE="$(command -v python)" -DEMOE_CUDA=0 -DEMOE_EMULATED=ON \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" -DEMOE_OUTPUT_DIR="$PWD/emoe" -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build build/emulated --target _C_emulated -- --quiet
