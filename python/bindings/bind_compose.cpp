#include "arrays.hpp"
#include "globe/compose.hpp"
#include "without_gil.hpp"

namespace globe::bindings {

void bind_compose(py::module_& module) {
    module.def(
        "compose",
        [](const Vector<std::int64_t>& indptr, const Vector<std::int32_t>& indices,
           const Vector<float>& values, const py::array& bank, const std::string& bank_dtype, py::array& out,
           const std::string& out_dtype, float epsilon, int threads) {
            const auto bank_view = const_matrix("bank", bank, parse_dtype("bank", bank_dtype));
            const auto out_view = matrix("out", out, parse_dtype("out", out_dtype));
            const auto codes = csr(indptr, indices, values, bank_view.rows);
            without_gil([&] { compose(codes, bank_view, out_view, epsilon, threads); });
        },
        py::arg("indptr").noconvert(), py::arg("indices").noconvert(), py::arg("values").noconvert(),
        py::arg("bank"), py::arg("bank_dtype"), py::arg("out"), py::arg("out_dtype"), py::arg("epsilon"),
        py::arg("threads"), "out[i, :] = sum of codes[i, j] * bank[j, :]; 16-bit dtypes as uint16 bits.");
    module.def(
        "compose_code_gradient",
        [](const Vector<std::int64_t>& indptr, const Vector<std::int32_t>& indices,
           const Vector<float>& values, const py::array& gradient, const std::string& gradient_dtype,
           const py::array& bank, const std::string& bank_dtype, int threads) {
            const auto gradient_view =
                const_matrix("gradient", gradient, parse_dtype("gradient", gradient_dtype));
            const auto bank_view = const_matrix("bank", bank, parse_dtype("bank", bank_dtype));
            const auto codes = csr(indptr, indices, values, bank_view.rows);
            Vector<double> products(codes.nnz);
            double* target = products.mutable_data();
            without_gil([&] { compose_code_gradient(codes, gradient_view, bank_view, target, threads); });
            return products;
        },
        py::arg("indptr").noconvert(), py::arg("indices").noconvert(), py::arg("values").noconvert(),
        py::arg("gradient"), py::arg("gradient_dtype"), py::arg("bank"), py::arg("bank_dtype"),
        py::arg("threads"), "<gradient[i, :], bank[j, :]> for every stored entry (i, j).");
}

}  // namespace globe::bindings
