#!/usr/bin/env bash
# Installs the compilers and headers the build needs, where they are missing; with EMOE_WITH_BROWSER also a browser.
# Debian and Ubuntu only.
set -euo pipefail
missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v make >/dev/null || missing+=(make)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"${PYTHON:-python3}" -c 'import pathlib, sysconfig, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
    missing+=(python3-dev)
if [ ${#missing[@]} -ne 0 ]; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "missing: ${missing[*]}; install them with your system's package manager and run make again" >&2
        exit 1
    fi
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
# The tests of the status page want a browser, and are skipped by name without one.
[ -n "${EMOE_WITH_BROWSER:-}" ] || exit 0
command -v chromium >/dev/null && exit 0
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } ||
    echo "no chromium: the tests of the status page are skipped" >&2
