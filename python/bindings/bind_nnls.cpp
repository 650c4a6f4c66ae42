#include <pybind11/stl.h>

#include <optional>

#include "arrays.hpp"
#include "globe/nnls.hpp"
#include "without_gil.hpp"

namespace globe::bindings {
namespace {

template <class T>
T* target(const std::string& argument, Vector<T>& array, std::int64_t size) {
    if (array.size() != size) {
        throw std::invalid_argument(argument + ": found " + std::to_string(array.size()) +
                                    " entries; expected " + std::to_string(size));
    }
    return array.mutable_data();
}

}  // namespace

void bind_nnls(py::module_& module) {
    module.def(
        "nnls",
        [](const Vector<double>& gram, const Vector<double>& correlations, double l1, bool simplex,
           double tolerance, std::int64_t max_iterations, std::int64_t max_support,
           const std::optional<Vector<bool>>& warm_start, Vector<double>& codes, Vector<std::int8_t>& status,
           Vector<std::int64_t>& iterations, Vector<double>& kkt_residual, Vector<double>& scaled_residual,
           int threads) {
            if (gram.ndim() != 2 || gram.shape(0) != gram.shape(1)) {
                throw std::invalid_argument("gram: expected a square matrix");
            }
            const std::int64_t m = gram.shape(0), n = correlations.ndim() == 2 ? correlations.shape(0) : 0;
            if (correlations.ndim() != 2 || correlations.shape(1) != m) {
                throw std::invalid_argument("correlations: expected rows of " + std::to_string(m));
            }
            if (warm_start && warm_start->size() != n * m) {
                throw std::invalid_argument("warm_start: expected one entry per correlation");
            }
            const NnlsProblem problem{gram.data(), correlations.data(), m, n, l1, simplex};
            const NnlsOptions options{tolerance, max_iterations, max_support,
                                      warm_start ? warm_start->data() : nullptr};
            const NnlsResult result{
                target("codes", codes, n * m), reinterpret_cast<NnlsStatus*>(target("status", status, n)),
                target("iterations", iterations, n), target("kkt_residual", kkt_residual, n),
                target("scaled_residual", scaled_residual, n)};
            without_gil([&] { nnls(problem, options, result, threads); });
        },
        py::arg("gram").noconvert(), py::arg("correlations").noconvert(), py::arg("l1"), py::arg("simplex"),
        py::arg("tolerance"), py::arg("max_iterations"), py::arg("max_support"),
        py::arg("warm_start").noconvert(), py::arg("codes").noconvert(), py::arg("status").noconvert(),
        py::arg("iterations").noconvert(), py::arg("kkt_residual").noconvert(),
        py::arg("scaled_residual").noconvert(), py::arg("threads"),
        "Non-negative least squares from a Gram matrix; 0 for no bound on the support.");
}

}  // namespace globe::bindings
