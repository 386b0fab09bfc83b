# Cross-compiles for aarch64 Linux with Debian's g++-aarch64-linux-gnu and the arm64 packages of a multiarch system.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

# Libraries of arm64 alone; headers are shared by all architectures of a multiarch system.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu /usr/lib/aarch64-linux-gnu /usr)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)

# Executables of the build run under QEMU's user emulation, so ctest works.
find_program(HYWU_QEMU NAMES qemu-aarch64-static qemu-aarch64)
if(HYWU_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${HYWU_QEMU})
endif()
