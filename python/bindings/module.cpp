#include <pybind11/pybind11.h>

namespace globe::bindings {
void bind_compose(pybind11::module_& module);
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled kernels of GloBE. Use globe.kernels, which validates and documents.";
    globe::bindings::bind_compose(module);
}
