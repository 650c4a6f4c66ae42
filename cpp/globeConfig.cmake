# Read by find_package(globe): the targets globe::static and globe::shared, where they are installed, and globe::globe,
# which is the shared one if BUILD_SHARED_LIBS says so, or there is no other.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include("${CMAKE_CURRENT_LIST_DIR}/globeTargets.cmake")
if(NOT TARGET globe::globe)
  if(TARGET globe::shared AND (BUILD_SHARED_LIBS OR NOT TARGET globe::static))
    add_library(globe::globe ALIAS globe::shared)
  else()
    add_library(globe::globe ALIAS globe::static)
  endif()
endif()
