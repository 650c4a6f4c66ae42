#include "arrays.hpp"
#include "globe/entmax.hpp"
#include "without_gil.hpp"

namespace globe::bindings {
namespace {

template <class T>
void bind_type(py::module_& module) {
    module.def(
        "entmax",
        [](const Vector<T>& logits, Vector<T>& out, double alpha, double temperature, double epsilon,
           int threads) {
            const auto from = const_rows("logits", logits);
            const auto to = rows("out", out);
            without_gil([&] { entmax(from, to, {alpha, temperature, epsilon}, threads); });
        },
        py::arg("logits").noconvert(), py::arg("out").noconvert(), py::arg("alpha"), py::arg("temperature"),
        py::arg("epsilon"), py::arg("threads"), "Sparse probabilities, row by row.");
    module.def(
        "entmax_backward",
        [](const Vector<T>& probabilities, const Vector<T>& gradient, Vector<T>& out, double alpha,
           double temperature, int threads) {
            const auto from = const_rows("probabilities", probabilities);
            const auto pull = const_rows("gradient", gradient);
            const auto to = rows("out", out);
            without_gil([&] { entmax_backward(from, pull, to, {alpha, temperature, 0.0}, threads); });
        },
        py::arg("probabilities").noconvert(), py::arg("gradient").noconvert(), py::arg("out").noconvert(),
        py::arg("alpha"), py::arg("temperature"), py::arg("threads"),
        "Derivative with respect to the logits, row by row.");
}

}  // namespace

void bind_entmax(py::module_& module) {
    bind_type<float>(module);
    bind_type<double>(module);
}

}  // namespace globe::bindings
