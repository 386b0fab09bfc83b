# How the targets of this project are made.

# hywu_objects(NAME [LINK library…] SOURCES file…): the objects of one folder under src/. LINK names what its
# headers and sources use; objects are handed on to those who name them, see hywu_link.
function(hywu_objects name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;LINK")
  add_library(${name} OBJECT ${arg_SOURCES})
  target_link_libraries(${name} PUBLIC hywu_settings ${arg_LINK})
  target_compile_definitions(${name} PRIVATE HYWU_BUILD)
  set_property(GLOBAL APPEND PROPERTY HYWU_OBJECTS ${name})
endfunction()

# hywu_link(TARGET): all objects that there are so far, with their libraries.
function(hywu_link target)
  get_property(objects GLOBAL PROPERTY HYWU_OBJECTS)
  target_link_libraries(${target} PRIVATE ${objects})
  if(NOT APPLE)
    target_link_options(${target} PRIVATE -Wl,--gc-sections)
  endif()
endfunction()

# hywu_test(NAME SOURCES file… [LINK library…] [TIMEOUT seconds]): a doctest executable with all objects, run by ctest.
function(hywu_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "TIMEOUT" "SOURCES;LINK")
  add_executable(${name} ${arg_SOURCES})
  hywu_link(${name})
  target_compile_definitions(${name} PRIVATE
    HYWU_STATIC HYWU_SOURCE_DIR="${PROJECT_SOURCE_DIR}" HYWU_REPOSITORY_DIR="${HYWU_REPOSITORY_DIR}")
  target_link_libraries(${name} PRIVATE hywu_settings doctest::doctest ${arg_LINK})
  add_test(NAME ${name} COMMAND ${name})
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${arg_TIMEOUT})
endfunction()

# hywu_fuzzer(NAME SOURCES file… [CORPUS folder]): a libFuzzer target; ctest runs its corpus once. A longer run:
# build/fuzz/fuzz/NAME -max_total_time=600 CORPUS
function(hywu_fuzzer name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "CORPUS" "SOURCES")
  add_executable(${name} ${arg_SOURCES})
  hywu_link(${name})
  target_compile_definitions(${name} PRIVATE HYWU_STATIC)
  target_link_libraries(${name} PRIVATE hywu_settings)
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  if(HYWU_TESTS AND arg_CORPUS)
    add_test(NAME ${name} COMMAND ${name} -runs=0 ${arg_CORPUS})
  endif()
endfunction()

get_filename_component(HYWU_REPOSITORY_DIR ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
