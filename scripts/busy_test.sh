#!/usr/bin/env bash
# Runs `make test` N times in a row (default 3) beside two processes that never rest: no test may depend on how fast the
# machine is or on when a read arrives. `bash scripts/busy_test.sh [N [COMMAND ...]]` runs COMMAND in its place.
set -u
cd "$(dirname "$0")/.."
runs=${1:-3}
case $runs in '' | *[!0-9]* | 0*) echo "usage: $0 [N [COMMAND ...]]: N=$runs is no number from 1" >&2; exit 2 ;; esac
shift || true
[ $# -gt 0 ] || set -- make test

busy=()
trap 'kill "${busy[@]}" 2>/dev/null' EXIT
trap 'exit 130' INT TERM
for _ in 1 2; do
  (trap - EXIT INT TERM; while :; do :; done) &
  busy+=($!)
done

failed=0
for run in $(seq "$runs"); do
  if "$@"; then outcome=passed; else outcome=FAILED; failed=$((failed + 1)); fi
  echo "busy_test: run $run of $runs $outcome"
done
echo "busy_test: $((runs - failed)) of $runs runs passed beside ${#busy[@]} busy processes"
exit $((failed > 0))
