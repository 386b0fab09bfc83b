# What `cmake --install` gives: the library, its headers, the executables, and what CMake and pkg-config need to find them.
include(CMakePackageConfigHelpers)

install(TARGETS hywu EXPORT hywu
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY include/hywu DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
foreach(tool IN ITEMS hywu-edit hywu-bench)
  if(TARGET ${tool})
    set_target_properties(${tool} PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")
    install(TARGETS ${tool} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
endforeach()

set(folder ${CMAKE_INSTALL_LIBDIR}/cmake/hywu)
install(EXPORT hywu FILE hywuConfig.cmake NAMESPACE hywu:: DESTINATION ${folder})
# Until 1.0 every minor version may break what is built on it.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/hywuConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/hywuConfigVersion.cmake DESTINATION ${folder})

# Relative to the file itself, so that an installed tree may be moved.
file(RELATIVE_PATH HYWU_PC_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(${CMAKE_CURRENT_LIST_DIR}/hywu.pc.in hywu.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/hywu.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
