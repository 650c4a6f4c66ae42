#include "arrays.hpp"
#include "globe/compose_matmul.hpp"
#include "without_gil.hpp"

namespace globe::bindings {

void bind_compose_matmul(py::module_& module) {
    module.def(
        "compose_matmul",
        [](const Vector<std::int64_t>& indptr, const Vector<std::int32_t>& indices,
           const Vector<float>& values, const py::array& bank, const std::string& bank_dtype,
           const Vector<std::int64_t>& rows, const py::array& x, const std::string& x_dtype, py::array& out,
           const std::string& out_dtype, int threads) {
            const auto bank_view = const_matrix("bank", bank, parse_dtype("bank", bank_dtype));
            const auto x_view = const_matrix("x", x, parse_dtype("x", x_dtype));
            const auto out_view = matrix("out", out, parse_dtype("out", out_dtype));
            const auto codes = csr(indptr, indices, values, bank_view.rows);
            if (rows.ndim() != 1 || rows.size() != x_view.rows)
                throw std::invalid_argument("rows: expected a row of codes for each token");
            without_gil([&] { compose_matmul(codes, bank_view, rows.data(), x_view, out_view, threads); });
        },
        py::arg("indptr").noconvert(), py::arg("indices").noconvert(), py::arg("values").noconvert(),
        py::arg("bank"), py::arg("bank_dtype"), py::arg("rows").noconvert(), py::arg("x"), py::arg("x_dtype"),
        py::arg("out"), py::arg("out_dtype"), py::arg("threads"),
        "out[t, :] = (sum of codes[rows[t], j] * bank[j]) x[t, :]; 16-bit dtypes as uint16 bits.");
}

}  // namespace globe::bindings
