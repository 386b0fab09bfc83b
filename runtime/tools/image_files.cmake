# hywu_image_files: JPEG and PNG files, for the executables, their tests and their fuzz target.
if(JPEG_FOUND AND PNG_FOUND AND NOT TARGET hywu_image_files)
  foreach(name IN ITEMS file jpeg metadata png)
    list(APPEND image_sources ${CMAKE_CURRENT_LIST_DIR}/image_${name}.cpp)
  endforeach()
  add_library(hywu_image_files OBJECT ${image_sources})
  target_include_directories(hywu_image_files PUBLIC ${CMAKE_CURRENT_LIST_DIR})
  target_link_libraries(hywu_image_files PUBLIC hywu_settings JPEG::JPEG PNG::PNG)
endif()
