# Install rules: library, headers, CMake package, pkg-config file. One set serves a system prefix and a wheel, whose prefix is the package directory.
set(KVARN_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/kvarn)

install(TARGETS kvarn EXPORT kvarnTargets
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY cpp/include/kvarn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
install(EXPORT kvarnTargets NAMESPACE kvarn:: DESTINATION ${KVARN_CMAKE_DIR})

configure_package_config_file(cmake/kvarnConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/kvarnConfig.cmake INSTALL_DESTINATION ${KVARN_CMAKE_DIR})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/kvarnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvarnConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/kvarnConfigVersion.cmake DESTINATION ${KVARN_CMAKE_DIR})

# The prefix is written relative to the .pc file, so an install tree may be moved.
set(KVARN_PC_DIR ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH KVARN_PC_PREFIX /${KVARN_PC_DIR} /)
string(REGEX REPLACE "/$" "" KVARN_PC_PREFIX "${KVARN_PC_PREFIX}")
set(KVARN_PC_LIBS_STATIC "-lstdc++ -lm -ldl -pthread")
if(BUILD_SHARED_LIBS)
  set(KVARN_PC_LIBS_PRIVATE "Libs.private: ${KVARN_PC_LIBS_STATIC}")
  set(KVARN_PC_LIBS "-lkvarn")
else()
  set(KVARN_PC_LIBS_PRIVATE "")
  set(KVARN_PC_LIBS "-lkvarn ${KVARN_PC_LIBS_STATIC}")
endif()
configure_file(cmake/kvarn.pc.in ${CMAKE_CURRENT_BINARY_DIR}/kvarn.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvarn.pc DESTINATION ${KVARN_PC_DIR})
