#!/usr/bin/env bash
# What `make demo` and `make test` need and pip cannot bring: Python with venv, and make.
# Does nothing where it is all there; otherwise needs root on a Debian or Ubuntu machine.
set -euo pipefail

missing=()
python=""
for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null 2>&1 &&
        "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || missing+=(python3 python3-venv)
command -v make >/dev/null 2>&1 || missing+=(make)

[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "Missing: ${missing[*]}. Install them with your package manager, or run 'make deps' as root on Debian or Ubuntu." >&2
    exit 2
fi
apt-get update -qq
apt-get install -y -qq "${missing[@]}"
