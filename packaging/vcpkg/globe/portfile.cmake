# Builds from a source archive: vcpkg install globe --overlay-ports=packaging/vcpkg, with GLOBE_ARCHIVE in the
# environment (and named in VCPKG_KEEP_ENV_VARS) the path of globe_moe-<version>.tar.gz.
if(NOT EXISTS "$ENV{GLOBE_ARCHIVE}")
  message(FATAL_ERROR "GLOBE_ARCHIVE: found '$ENV{GLOBE_ARCHIVE}'; expected the path of a source archive of globe-moe")
endif()
vcpkg_extract_source_archive(SOURCE_PATH ARCHIVE "$ENV{GLOBE_ARCHIVE}")
vcpkg_cmake_configure(SOURCE_PATH "${SOURCE_PATH}" OPTIONS -DGLOBE_TESTS=OFF -DGLOBE_PYTHON=OFF -DGLOBE_SYSTEM_JSON=ON)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH lib/cmake/globe)
vcpkg_fixup_pkgconfig()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/debug/include" "${CURRENT_PACKAGES_DIR}/debug/share")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
