"""Builds the C++ library from a source archive: GLOBE_ARCHIVE=globe_moe-0.1.0.tar.gz conan create packaging/conan."""

import os

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout
from conan.tools.files import copy, unzip


class Globe(ConanFile):
    """The recipe."""

    name = "globe"
    version = "0.1.0"
    license = "Apache-2.0"
    description = "Runs mixture-of-experts checkpoints whose experts share one bank of atoms"
    package_type = "library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"shared": [True, False], "fPIC": [True, False]}  # noqa: RUF012
    default_options = {"shared": False, "fPIC": True}  # noqa: RUF012
    generators = "CMakeDeps"

    def validate(self):
        """Refuse what the kernels are not written for."""
        if self.settings.compiler not in ("gcc", "clang", "apple-clang"):
            raise ConanInvalidConfiguration(f"compiler is {self.settings.compiler}; expected gcc, clang or apple-clang")

    def layout(self):
        """Lay it out as CMake projects are."""
        cmake_layout(self)

    def requirements(self):
        """Only at compile time."""
        self.requires("nlohmann_json/[>=3.11 <4]", visible=False)

    def source(self):
        """Unpack the archive."""
        archive = os.environ.get("GLOBE_ARCHIVE", "")
        if not os.path.isfile(archive):
            raise ConanInvalidConfiguration(f"GLOBE_ARCHIVE is {archive!r}; expected the path of a source archive")
        unzip(self, archive, strip_root=True)

    def generate(self):
        """Say what is to be built."""
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables.update(GLOBE_TESTS=False, GLOBE_PYTHON=False, GLOBE_SYSTEM_JSON=True)
        toolchain.generate()

    def build(self):
        """Build it."""
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        """Install it, with its licence."""
        CMake(self).install()
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))

    def package_info(self):
        """Name the target as find_package does."""
        self.cpp_info.libs = ["globe"]
        self.cpp_info.set_property("cmake_target_name", "globe::globe")
        if self.settings.os == "Linux":
            self.cpp_info.system_libs = ["pthread", "m"]
