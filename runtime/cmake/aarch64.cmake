# Cross-compiles for aarch64 Linux with Debian's g++-aarch64-linux-gnu. The arm64 libraries come from .sdk/aarch64, which
# tools/aarch64_sdk.py puts together, or from the packages of a multiarch system.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

get_filename_component(sdk ${CMAKE_CURRENT_LIST_DIR}/../../.sdk ABSOLUTE)
set(CMAKE_FIND_ROOT_PATH ${sdk}/aarch64 /usr/aarch64-linux-gnu /)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)
set(CMAKE_SYSTEM_LIBRARY_PATH /usr/lib/aarch64-linux-gnu)
set(CMAKE_IGNORE_PATH /usr/lib/x86_64-linux-gnu /lib/x86_64-linux-gnu)

# Executables of the build run under QEMU's user emulation, so ctest works.
find_program(HYWU_QEMU NAMES qemu-aarch64-static qemu-aarch64)
if(HYWU_QEMU)
  set(libraries ${sdk}/aarch64/usr/lib/aarch64-linux-gnu:${sdk}/onnxruntime-aarch64/lib)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${HYWU_QEMU};-L;/usr/aarch64-linux-gnu;-E;LD_LIBRARY_PATH=${libraries})
endif()

# Headers that differ between architectures (libjpeg's configuration).
set(CMAKE_C_FLAGS_INIT "-isystem ${sdk}/aarch64/usr/include/aarch64-linux-gnu")
set(CMAKE_CXX_FLAGS_INIT "${CMAKE_C_FLAGS_INIT}")
