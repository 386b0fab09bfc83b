# TensorRT::headers and TensorRT::rtx_headers: the headers of TensorRT (10.3 or later) and of TensorRT-RTX, with those of
# CUDA; the libraries are opened when they are first used.
#
# Looked for below TensorRT_ROOT, TensorRT_RTX_ROOT and CUDAToolkit_ROOT (variables or environment) and in the system,
# where JetPack has them.
include(FindPackageHandleStandardArgs)
find_path(CUDA_INCLUDE_DIR cuda_runtime_api.h
  HINTS ${CUDAToolkit_ROOT} ENV CUDAToolkit_ROOT ENV CUDA_PATH ENV CUDA_HOME /usr/local/cuda
  PATH_SUFFIXES include targets/aarch64-linux/include targets/x86_64-linux/include
  NO_CMAKE_FIND_ROOT_PATH)
find_path(CUDA_INCLUDE_DIR cuda_runtime_api.h)
find_path(TensorRT_INCLUDE_DIR NvInferVersion.h
  HINTS ${TensorRT_ROOT} ENV TensorRT_ROOT PATH_SUFFIXES include NO_CMAKE_FIND_ROOT_PATH)
find_path(TensorRT_INCLUDE_DIR NvInferVersion.h)
find_path(TensorRT_RTX_INCLUDE_DIR NvInferVersion.h
  HINTS ${TensorRT_RTX_ROOT} ENV TensorRT_RTX_ROOT PATH_SUFFIXES include NO_DEFAULT_PATH)
mark_as_advanced(CUDA_INCLUDE_DIR TensorRT_INCLUDE_DIR TensorRT_RTX_INCLUDE_DIR)

# The version in a folder's headers, and whether they are those of TensorRT-RTX.
function(hywu_tensorrt_version folder version_variable rtx_variable)
  file(STRINGS ${folder}/NvInferVersion.h lines REGEX "^#define (NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(_RTX|_ENTERPRISE)? [0-9]+")
  set(rtx OFF)
  foreach(part IN ITEMS MAJOR MINOR PATCH)
    set(${part} 0)
    foreach(line IN LISTS lines)
      if(line MATCHES "${part}(_RTX|_ENTERPRISE)? ([0-9]+)")
        set(${part} ${CMAKE_MATCH_2})
        if(CMAKE_MATCH_1 STREQUAL "_RTX")
          set(rtx ON)
        endif()
      endif()
    endforeach()
  endforeach()
  set(${version_variable} ${MAJOR}.${MINOR}.${PATCH} PARENT_SCOPE)
  set(${rtx_variable} ${rtx} PARENT_SCOPE)
endfunction()

if(TensorRT_INCLUDE_DIR)
  hywu_tensorrt_version(${TensorRT_INCLUDE_DIR} TensorRT_VERSION is_rtx)
  if(is_rtx AND NOT TensorRT_RTX_INCLUDE_DIR)
    set(TensorRT_RTX_INCLUDE_DIR ${TensorRT_INCLUDE_DIR})
  endif()
  if(is_rtx)
    set(TensorRT_VERSION NOTFOUND)
  endif()
endif()
if(TensorRT_RTX_INCLUDE_DIR)
  hywu_tensorrt_version(${TensorRT_RTX_INCLUDE_DIR} TensorRT_RTX_VERSION is_rtx)
endif()

foreach(which IN ITEMS TensorRT TensorRT_RTX)
  if(which STREQUAL "TensorRT")
    set(target TensorRT::headers)
    set(least 10.3)
  else()
    set(target TensorRT::rtx_headers)
    set(least 1.0)
  endif()
  if(${which}_VERSION AND ${which}_VERSION VERSION_LESS least)
    message(STATUS "${which} ${${which}_VERSION} is older than ${least}, the oldest that is supported")
  elseif(${which}_VERSION AND CUDA_INCLUDE_DIR AND NOT TARGET ${target})
    add_library(${target} INTERFACE IMPORTED)
    set_target_properties(${target} PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${${which}_INCLUDE_DIR};${CUDA_INCLUDE_DIR}")
    message(STATUS "${which} ${${which}_VERSION}: ${${which}_INCLUDE_DIR}")
  endif()
endforeach()
set(TensorRT_HEADERS)
if(TARGET TensorRT::headers OR TARGET TensorRT::rtx_headers)
  set(TensorRT_HEADERS YES)
endif()
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_HEADERS
  REASON_FAILURE_MESSAGE "no headers of TensorRT and CUDA")
