#!/usr/bin/env bash
# Builds emoe/_C_emulated: the CUDA part with its kernels on the fake runtime of the tests. Needs CUDA's headers.
# In the folder of the native tests of that kind (native_tests.sh), so that neither compiles what the other has.
# scripts/emulated.sh address|thread PYTEST-ARGUMENTS   builds it under a sanitizer, elsewhere, and runs tests with it
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-plain}
folder=$PWD/build/native-tests-$kind
case $kind in
  plain) sanitize="" target=$PWD/emoe library="" ;;
  address) sanitize="address;undefined" target=$folder/module library=libasan.so ;;
  thread) sanitize="thread" target=$folder/module library=libtsan.so ;;
  *) echo "emulated.sh: '$kind' is not one of: plain, address, thread" >&2; exit 2 ;;
esac
cmake -G Ninja -S . -B "$folder" -DPython_EXECUTABLE="$(command -v python)" -DEMOE_TESTS=ON -DEMOE_EMULATED=ON \
  -DEMOE_WERROR=ON -DEMOE_CUDA=0 \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" -DEMOE_OUTPUT_DIR="$target" -DCMAKE_BUILD_TYPE=Release \
  -DEMOE_SANITIZE="$sanitize" >/dev/null
cmake --build "$folder" --target _C_emulated -- --quiet
[[ $kind == plain ]] && exit
shift
# Python and torch are not instrumented: the sanitizer has to be there before them, and what only they do is not its matter.
# libstdc++ stands beside it so that their exceptions are found. pytest captures standard error, so reports go to files.
# The limit of a test is for plain builds; ThreadSanitizer is several times slower.
rm -f "$folder"/report.*
options=halt_on_error=1:log_path=$folder/report
env LD_PRELOAD="$(g++ -print-file-name=$library) $(g++ -print-file-name=libstdc++.so)" EMOE_EMULATED_FROM="$target" \
  ASAN_OPTIONS=detect_leaks=0:$options UBSAN_OPTIONS=print_stacktrace=1:$options \
  TSAN_OPTIONS=ignore_noninstrumented_modules=1:$options \
  setarch "$(uname -m)" -R python -m pytest --timeout 1200 "$@" && exit
status=$?
cat "$folder"/report.* >&2 2>/dev/null || true  # none where a test just failed
exit $status
