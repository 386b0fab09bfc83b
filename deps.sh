#!/usr/bin/env bash
# What `make demo`, `make test` and `make cpp` need and pip cannot bring: Python with venv, make, compilers, libraries.
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

# The C++ runtime: a file or program that a package brings, and the package.
needed=(
    g++ g++  cmake cmake  ninja ninja-build  ccache ccache  pkg-config pkg-config  clang++ clang  readelf binutils
    clang-format clang-format  clang-tidy clang-tidy  valgrind valgrind
    /usr/include/nlohmann/json.hpp nlohmann-json3-dev  /usr/include/pcre2.h libpcre2-dev
    /usr/include/utf8proc.h libutf8proc-dev  /usr/include/jpeglib.h libjpeg-dev  /usr/include/png.h libpng-dev
    /usr/include/doctest/doctest.h doctest-dev
    aarch64-linux-gnu-g++ g++-aarch64-linux-gnu  qemu-aarch64-static qemu-user-static
    x86_64-w64-mingw32-g++-posix g++-mingw-w64-x86-64-posix
)
for ((i = 0; i < ${#needed[@]}; i += 2)); do
    what=${needed[i]}
    if [ "${what#/}" != "$what" ]; then [ -e "$what" ]; else command -v "$what" >/dev/null 2>&1; fi ||
        missing+=("${needed[i + 1]}")
done

# The sanitizers' and libFuzzer's libraries, which some releases pack apart from clang and only recommend.
lacks_clang_runtime() {
    command -v clang++ >/dev/null 2>&1 &&
        ! echo 'int main() {}' | clang++ -x c++ -fsanitize=address,undefined - -o /dev/null >/dev/null 2>&1
}
clang_runtime() { echo "libclang-rt-$(clang++ -dumpversion | cut -d. -f1)-dev"; }
if lacks_clang_runtime; then missing+=("$(clang_runtime)"); fi

[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "Missing: ${missing[*]}. Install them with your package manager, or run 'make deps' as root on Debian or Ubuntu." >&2
    exit 2
fi
apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; }
apt-get update -qq
apt_install "${missing[@]}"
if lacks_clang_runtime; then apt_install "$(clang_runtime)"; fi
