#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "globe/isa.hpp"

namespace globe::bindings {
void bind_compose(pybind11::module_& module);
void bind_compose_matmul(pybind11::module_& module);
void bind_entmax(pybind11::module_& module);
void bind_nnls(pybind11::module_& module);
void bind_gram(pybind11::module_& module);
void bind_layer(pybind11::module_& module);
void bind_qmatmul(pybind11::module_& module);
}  // namespace globe::bindings

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled kernels of GloBE. Use globe.kernels, which validates and documents.";
    module.def("runnable_isas", &globe::runnable_isas, "Instruction sets that can run here, weakest first.");
    module.def("active_isa", &globe::active_isa, "The instruction set in use.");
    module.def("use_isa", &globe::use_isa, pybind11::arg("name"), "Switch to another instruction set.");
    globe::bindings::bind_compose(module);
    globe::bindings::bind_compose_matmul(module);
    globe::bindings::bind_entmax(module);
    globe::bindings::bind_nnls(module);
    globe::bindings::bind_gram(module);
    globe::bindings::bind_layer(module);
    globe::bindings::bind_qmatmul(module);
}
