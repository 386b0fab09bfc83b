# ONNXRuntime::headers: the C API's headers alone; the library is opened when it is first used.
#
# Looked for below ONNXRuntime_ROOT or ONNXRUNTIME_ROOT (variable or environment), in .sdk/onnxruntime, which
# tools/onnxruntime_sdk.py assembles, and in the system.
include(FindPackageHandleStandardArgs)
find_path(ONNXRuntime_INCLUDE_DIR onnxruntime_c_api.h
  HINTS ${ONNXRuntime_ROOT} ${ONNXRUNTIME_ROOT} ENV ONNXRUNTIME_ROOT ${HYWU_REPOSITORY_DIR}/.sdk/onnxruntime
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session
  NO_CMAKE_FIND_ROOT_PATH)
find_path(ONNXRuntime_INCLUDE_DIR onnxruntime_c_api.h
  PATH_SUFFIXES onnxruntime onnxruntime/core/session)
if(ONNXRuntime_INCLUDE_DIR)
  file(STRINGS ${ONNXRuntime_INCLUDE_DIR}/onnxruntime_c_api.h line REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX REPLACE "[^0-9]" "" ONNXRuntime_API_VERSION "${line}")
  set(ONNXRuntime_VERSION 1.${ONNXRuntime_API_VERSION})
endif()
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRuntime_INCLUDE_DIR VERSION_VAR ONNXRuntime_VERSION)
mark_as_advanced(ONNXRuntime_INCLUDE_DIR)
if(ONNXRuntime_FOUND AND NOT TARGET ONNXRuntime::headers)
  add_library(ONNXRuntime::headers INTERFACE IMPORTED)
  set_target_properties(ONNXRuntime::headers PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES ${ONNXRuntime_INCLUDE_DIR})
endif()
if(MINGW AND TARGET ONNXRuntime::headers)
  # Annotations for Microsoft's compiler that MinGW's headers do not know.
  set_property(TARGET ONNXRuntime::headers PROPERTY INTERFACE_COMPILE_OPTIONS
    "SHELL:-include ${CMAKE_CURRENT_LIST_DIR}/mingw_annotations.h")
endif()
