# What a builder may choose, and what every target is compiled with.

set(HYWU_ONNXRUNTIME AUTO CACHE STRING "ONNX Runtime backend: AUTO builds it where the headers are found")
set(HYWU_TENSORRT AUTO CACHE STRING "TensorRT and TensorRT-RTX backends: AUTO builds them where headers are found")
set_property(CACHE HYWU_ONNXRUNTIME HYWU_TENSORRT PROPERTY STRINGS AUTO ON OFF)
option(HYWU_TOOLS "Build hywu-edit and hywu-bench" ON)
option(HYWU_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(HYWU_FUZZ "Build the libFuzzer targets (Clang)" OFF)
option(HYWU_WERROR "Warnings are errors" ${PROJECT_IS_TOP_LEVEL})
set(HYWU_SANITIZE "" CACHE STRING "Sanitizers: address,undefined or thread")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo or MinSizeRel" FORCE)
endif()

# The time of an edit is in the backend's library: -O3 makes this one a quarter larger and no faster.
if(PROJECT_IS_TOP_LEVEL)
  set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")
  set(CMAKE_C_FLAGS_RELEASE "-O2 -DNDEBUG")
endif()

find_program(HYWU_CCACHE ccache)
mark_as_advanced(HYWU_CCACHE)
if(HYWU_CCACHE AND PROJECT_IS_TOP_LEVEL AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_C_COMPILER_LAUNCHER ${HYWU_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${HYWU_CCACHE})
endif()

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_C_STANDARD 99)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
find_package(Threads REQUIRED)

# Linked by every target of ours.
add_library(hywu_settings INTERFACE)
target_include_directories(hywu_settings INTERFACE
  ${CMAKE_CURRENT_SOURCE_DIR}/src ${CMAKE_CURRENT_SOURCE_DIR}/include)
target_link_libraries(hywu_settings INTERFACE Threads::Threads ${CMAKE_DL_LIBS})
target_compile_definitions(hywu_settings INTERFACE
  $<$<PLATFORM_ID:Windows>:NOMINMAX;WIN32_LEAN_AND_MEAN;_WIN32_WINNT=0x0A00>)
target_compile_options(hywu_settings INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion $<$<BOOL:${HYWU_WERROR}>:-Werror>
  # Pixels and tables are the same bytes on every machine: no fused multiply-adds where the source has none.
  -ffp-contract=off
  -ffunction-sections -fdata-sections)

if(HYWU_SANITIZE)
  target_compile_options(hywu_settings INTERFACE
    -fsanitize=${HYWU_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  target_link_options(hywu_settings INTERFACE -fsanitize=${HYWU_SANITIZE})
endif()
if(HYWU_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "HYWU_FUZZ needs Clang (libFuzzer), and the compiler is ${CMAKE_CXX_COMPILER_ID}. "
                        "Configure with -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++, or use the preset fuzz.")
  endif()
  target_compile_options(hywu_settings INTERFACE -fsanitize=fuzzer-no-link)
endif()
