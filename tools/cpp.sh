#!/usr/bin/env bash
# Builds and tests the C++ runtime: tools/cpp.sh [STAGE…], all of them by default. `make cpp` runs it.
#
# A stage whose tools are not there is left out, and named at the end; in CI (CI=true) that is an error.
# Jobs: HYWU_JOBS, otherwise the number of processors.
set -euo pipefail
cd "$(dirname "$0")/../runtime"

stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(release asan tsan fuzz aarch64 mingw)
python=../.venv/bin/python
[ -x "$python" ] || python=python3
jobs=${HYWU_JOBS:-$(nproc)}
left_out=()

has() { command -v "$1" >/dev/null 2>&1; }
leave_out() { left_out+=("$1: $2"); echo "== $1: LEFT OUT: $2"; }
build() {
    echo "== $1: build"
    cmake --preset "$1" >"../build/$1.log" 2>&1 || { cat "../build/$1.log"; return 1; }
    grep -E 'LEFT OUT' "../build/$1.log" || true
    cmake --build --preset "$1" -- -j"$jobs" >"../build/$1.log" 2>&1 || { grep -vE '^\[' "../build/$1.log"; return 1; }
}
check() { echo "== $1: test"; ctest --preset "$1" -j"$jobs" --quiet --output-on-failure; }

# A whole edit of the demo pair under QEMU, small: an emulated step of 128x128 pixels takes 40 s.
demo_on_aarch64() {
    local sdk=$PWD/../.sdk bundle=${HYWU_DEMO_BUNDLE:-$PWD/../out/bundle}
    [ -f "$bundle/manifest.json" ] || { leave_out "aarch64 demo edit" "out/bundle is not there (make demo)"; return 0; }
    echo "== aarch64: an edit of the demo pair"
    qemu-aarch64-static -L /usr/aarch64-linux-gnu \
        -E LD_LIBRARY_PATH="$sdk/aarch64/usr/lib/aarch64-linux-gnu:$PWD/../build/aarch64/src/api" \
        -E HYWU_ONNXRUNTIME_LIBRARY="$sdk/onnxruntime-aarch64/lib/libonnxruntime.so" \
        ../build/aarch64/tools/hywu-edit "$bundle" ../demo/photos/cat.jpg "make it sepia" --size 64x64 --steps 1 \
        --out ../build/aarch64/edited.png
}

for tool in cmake ninja g++; do
    has "$tool" || { leave_out "C++ runtime" "there is no $tool (make deps)"; stages=(); break; }
done
mkdir -p ../build
if [ ${#stages[@]} -gt 0 ]; then
    "$python" ../tools/onnxruntime_sdk.py || left_out+=("ONNX Runtime backend: see above")
fi

for stage in "${stages[@]+"${stages[@]}"}"; do
    case $stage in
        release)
            build release
            check release
            ;;
        asan)
            build asan
            check asan
            ;;
        tsan)
            build tsan
            # ONNX Runtime is not compiled for the sanitizer, so its own locks are not seen.
            TSAN_OPTIONS=suppressions=$PWD/tests/tsan.supp:ignore_noninstrumented_modules=1 check tsan
            ;;
        fuzz)
            has clang++ || { leave_out fuzz "there is no clang++ (make deps)"; continue; }
            echo 'int main() {}' | clang++ -x c++ -fsanitize=address,undefined - -o /dev/null >/dev/null 2>&1 ||
                { leave_out fuzz "clang++ has no sanitizer libraries (make deps)"; continue; }
            build fuzz
            ctest --preset fuzz -j"$jobs" -R '^fuzz_' --quiet --output-on-failure
            ;;
        aarch64)
            has aarch64-linux-gnu-g++ || { leave_out aarch64 "there is no aarch64-linux-gnu-g++ (make deps)"; continue; }
            "$python" ../tools/aarch64_sdk.py || { leave_out aarch64 "its libraries are missing"; continue; }
            build aarch64
            has qemu-aarch64-static || { leave_out "aarch64 tests" "there is no qemu-aarch64-static (make deps)"; continue; }
            "$python" ../tools/onnxruntime_sdk.py --machine aarch64 || left_out+=("ONNX Runtime for aarch64")
            HYWU_ONNXRUNTIME_LIBRARY=$PWD/../.sdk/onnxruntime-aarch64/lib/libonnxruntime.so check aarch64
            demo_on_aarch64
            ;;
        mingw)
            has x86_64-w64-mingw32-g++-posix || { leave_out mingw "there is no x86_64-w64-mingw32-g++-posix (make deps)"; continue; }
            "$python" ../tools/mingw_sdk.py || { leave_out mingw "its libraries are missing"; continue; }
            build mingw
            # The only symbols of the DLL are hywu_*.
            if x86_64-w64-mingw32-objdump -p ../build/mingw/src/api/libhywu*.dll |
                sed -n '/Ordinal\/Name Pointer/,$p' | awk '/^\t\[/ {print $NF}' | grep -v '^hywu_'; then
                echo "the DLL exports more than hywu_*" >&2
                exit 1
            fi
            ;;
        *) echo "There is no stage $stage" >&2; exit 2 ;;
    esac
done

if [ ${#left_out[@]} -gt 0 ]; then
    echo "== left out:"
    printf '   %s\n' "${left_out[@]}"
    [ -z "${CI:-}" ] || exit 1
fi
