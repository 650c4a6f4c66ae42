#include "arrays.hpp"
#include "globe/qmatmul.hpp"
#include "without_gil.hpp"

namespace globe::bindings {

void bind_qmatmul(py::module_& module) {
    module.def(
        "qmatmul",
        [](const py::array& x, const std::string& x_dtype, const Vector<std::int32_t>& packed, int bits,
           const py::array& scales, const std::string& scales_dtype, py::array& out,
           const std::string& out_dtype, int threads) {
            const auto x_view = const_matrix("x", x, parse_dtype("x", x_dtype));
            const auto words = const_rows("packed", packed);
            const auto scales_view = const_matrix("scales", scales, parse_dtype("scales", scales_dtype));
            const auto out_view = matrix("out", out, parse_dtype("out", out_dtype));
            if (bits != 4 && bits != 8) throw std::invalid_argument("bits: expected 4 or 8");
            const PackedView weights{words.data, words.rows, words.cols * (32 / bits), bits};
            without_gil([&] { qmatmul(x_view, weights, scales_view, out_view, threads); });
        },
        py::arg("x"), py::arg("x_dtype"), py::arg("packed").noconvert(), py::arg("bits"), py::arg("scales"),
        py::arg("scales_dtype"), py::arg("out"), py::arg("out_dtype"), py::arg("threads"),
        "out = x times the transpose of packed weights of 4 or 8 bits; 16-bit dtypes as uint16 bits.");
}

}  // namespace globe::bindings
