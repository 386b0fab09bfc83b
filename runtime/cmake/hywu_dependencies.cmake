# What the runtime takes from the system. Everything here is in Debian; docs/cpp.md says where it comes from elsewhere.

# JSON; headers alone, which a cross-compiler may have without the package's files.
find_package(nlohmann_json 3.7 QUIET)
if(NOT nlohmann_json_FOUND)
  find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp REQUIRED)
  add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)
  set_target_properties(nlohmann_json::nlohmann_json PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES ${NLOHMANN_JSON_INCLUDE_DIR})
endif()
find_package(PCRE2 10.32 REQUIRED)        # regular expressions with Unicode classes, for tokenizers
find_package(utf8proc REQUIRED)           # Unicode normalisation and categories, for tokenizers
if(HYWU_TOOLS OR HYWU_TESTS)
  find_package(JPEG)  # image files, in the executables alone
  find_package(PNG)
endif()
if(HYWU_TESTS)
  find_package(doctest REQUIRED)
endif()

# A backend is ON (needed), OFF, or AUTO: built if its headers are found.
function(hywu_backend option package variable)
  set(have OFF)
  if(NOT ${option} STREQUAL "OFF")
    find_package(${package})
    if(${package}_FOUND)
      set(have ON)
    elseif(NOT ${option} STREQUAL "AUTO")
      message(FATAL_ERROR "${option} is ${${option}}, but no headers of ${package} were found. "
                          "Set ${package}_ROOT to a folder with include/, or see docs/cpp.md.")
    endif()
  endif()
  set(${variable} ${have} PARENT_SCOPE)
endfunction()

hywu_backend(HYWU_ONNXRUNTIME ONNXRuntime HYWU_HAVE_ONNXRUNTIME)
if(MINGW)
  # NVIDIA's libraries for Windows have the classes of Microsoft's compiler, whose layout differs from this one's.
  set(HYWU_TENSORRT OFF)
endif()
hywu_backend(HYWU_TENSORRT TensorRT HYWU_HAVE_TENSORRT)

foreach(backend IN ITEMS ONNXRUNTIME TENSORRT)
  if(HYWU_HAVE_${backend})
    message(STATUS "Backend ${backend}: built")
  elseif(HYWU_${backend} STREQUAL "OFF")
    message(STATUS "Backend ${backend}: off")
  else()
    message(STATUS "Backend ${backend}: LEFT OUT, no headers were found (docs/cpp.md)")
  endif()
endforeach()
target_compile_definitions(hywu_settings INTERFACE
  $<$<BOOL:${HYWU_HAVE_ONNXRUNTIME}>:HYWU_HAVE_ONNXRUNTIME>
  $<$<BOOL:${HYWU_HAVE_TENSORRT}>:HYWU_HAVE_TENSORRT>)
