#!/usr/bin/env bash
# Builds csrc/tests three times (plain, AddressSanitizer + UBSan, ThreadSanitizer) and runs them.
# scripts/native_tests.sh [plain|address|thread ...]    all three unless named
# EMOE_TEST_CUDA: 0 (default) leaves out the CUDA part under host emulation, 1 adds it, only runs nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
declare -A SANITIZE=([plain]="" [address]="address;undefined" [thread]="thread")
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

for kind in "${@:-plain}" ; do
  if [[ ! -v SANITIZE[$kind] ]]; then
    echo "native_tests.sh: '$kind' is not one of: plain, address, thread" >&2
    exit 2
  fi
done
[[ $# -gt 0 ]] || set -- plain address thread

# Where the kernel places mappings very randomly, older ThreadSanitizer runtimes refuse to start; setarch -R turns that off.
run=()
if setarch "$(uname -m)" -R true 2>/dev/null; then run=(setarch "$(uname -m)" -R); fi

case ${EMOE_TEST_CUDA:-0} in
  0) chosen=(-E '^test_cuda') ;;
  1) chosen=() ;;
  only) chosen=(-R '^test_cuda') ;;
  *) echo "native_tests.sh: EMOE_TEST_CUDA='$EMOE_TEST_CUDA' is not one of: 0, 1, only" >&2; exit 2 ;;
esac

for kind in "$@"; do
  folder=build/native-tests-$kind
  echo "== $kind"
  cmake -G Ninja -S . -B "$folder" -DEMOE_TESTS=ON -DEMOE_WERROR=ON -DEMOE_CUDA=0 -DEMOE_SANITIZE="${SANITIZE[$kind]}" \
    -DCMAKE_BUILD_TYPE=Release >/dev/null
  cmake --build "$folder" -- --quiet
  "${run[@]}" ctest --test-dir "$folder" --output-on-failure --no-tests=error --timeout 600 -j 2 "${chosen[@]}"
done
