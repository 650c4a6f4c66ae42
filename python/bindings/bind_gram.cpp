#include <pybind11/stl.h>

#include <optional>

#include "arrays.hpp"
#include "globe/gram.hpp"
#include "without_gil.hpp"

namespace globe::bindings {

void bind_gram(py::module_& module) {
    module.def(
        "gram_add",
        [](const py::array& vectors, const std::string& dtype, py::array_t<double>& gram,
           const std::optional<Vector<float>>& weights, int threads) {
            const auto view = strided_matrix("vectors", vectors, parse_dtype("vectors", dtype));
            double* target = square("gram", gram, view.rows);
            if (weights && (weights->ndim() != 1 || weights->size() != view.cols)) {
                throw std::invalid_argument("weights: expected one weight per column of vectors");
            }
            const float* factors = weights ? weights->data() : nullptr;
            without_gil([&] { gram_add(view, target, factors, threads); });
        },
        py::arg("vectors"), py::arg("dtype"), py::arg("gram").noconvert(), py::arg("weights").noconvert(),
        py::arg("threads"), "Add the lower triangle of X diag(w) X^T; 16-bit dtypes as uint16 bits.");
    module.def(
        "gram_mirror",
        [](py::array_t<double>& gram) {
            double* target = square("gram", gram, gram.ndim() == 2 ? gram.shape(0) : -1);
            const std::int64_t n = gram.shape(0);
            without_gil([&] { gram_mirror(target, n); });
        },
        py::arg("gram").noconvert(), "Copy the lower triangle to the upper.");
}

}  // namespace globe::bindings
