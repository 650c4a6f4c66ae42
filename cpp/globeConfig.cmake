# Read by find_package(globe): the target globe::globe.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include("${CMAKE_CURRENT_LIST_DIR}/globeTargets.cmake")
