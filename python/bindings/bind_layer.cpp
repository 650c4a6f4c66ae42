#include <array>

#include "arrays.hpp"
#include "globe/layer.hpp"
#include "without_gil.hpp"

namespace globe::bindings {
namespace {

// A family of a layer's experts, with the arrays that it lies in.
struct Held {
    FamilyView view;
    std::int64_t experts;
    std::array<py::object, 6> kept;
};

Held family(const py::array& matrices, const std::string& dtype) {
    const DType kind = parse_dtype("matrices", dtype);
    const auto entry = static_cast<std::int64_t>(size_of(kind));
    if (matrices.ndim() != 3 || matrices.itemsize() != entry || matrices.strides(2) != entry ||
        matrices.strides(0) % entry != 0 || matrices.strides(1) % entry != 0 ||
        matrices.strides(1) < matrices.shape(2) * entry)
        throw std::invalid_argument("matrices: expected three axes, and rows without gaps inside");
    Held made{{{matrices.data(), matrices.shape(1), matrices.shape(2), kind, matrices.strides(1) / entry},
               matrices.strides(0) / entry},
              matrices.shape(0),
              {matrices}};
    return made;
}

Held factored(const py::array& lefts, const std::string& dtype, const py::array& atoms,
              const std::string& atoms_dtype, const Vector<std::int64_t>& indptr,
              const Vector<std::int32_t>& indices, const Vector<float>& values, std::int64_t first,
              std::int64_t step) {
    Held made = family(lefts, dtype);
    made.view.atoms = const_matrix("atoms", atoms, parse_dtype("atoms", atoms_dtype));
    made.view.codes = csr(indptr, indices, values, made.view.atoms.rows);
    made.view.first_row = first;
    made.view.row_step = step;
    made.kept = {lefts, atoms, indptr, indices, values};
    return made;
}

// Has the matrices of all experts where the caller says, who keeps them there.
void place(Held& held, const Vector<std::uintptr_t>& addresses) {
    if (addresses.ndim() != 1) throw std::invalid_argument("addresses: expected one for each expert");
    held.experts = addresses.size();
    held.view.each = reinterpret_cast<const void* const*>(addresses.data());
    held.kept[5] = addresses;
}

// The addresses of mixtures, an integer for each expert; null for None.
const void* const* addresses(const py::object& found, std::int64_t experts) {
    if (found.is_none()) return nullptr;
    if (!py::isinstance<Vector<std::uintptr_t>>(found))
        throw std::invalid_argument("mixtures: expected a contiguous array of uintp");
    const auto array = py::reinterpret_borrow<Vector<std::uintptr_t>>(found);  // no copy, which would be gone
    if (array.ndim() != 1 || array.size() != experts)
        throw std::invalid_argument("mixtures: expected an address for each expert");
    return reinterpret_cast<const void* const*>(array.data());
}

}  // namespace

void bind_layer(py::module_& module) {
    py::class_<Held>(module, "ExpertFamily")
        .def(py::init(&family), py::arg("matrices"), py::arg("dtype"), "A dense family, (experts, p, d).")
        .def(py::init(&factored), py::arg("lefts"), py::arg("dtype"), py::arg("atoms"),
             py::arg("atoms_dtype"), py::arg("indptr").noconvert(), py::arg("indices").noconvert(),
             py::arg("values").noconvert(), py::arg("first"), py::arg("step"),
             "A factored family: lefts (experts, p, r), atoms (m, r * d).")
        .def("place", &place, py::arg("addresses").noconvert(),
             "Say where every expert's matrix is; what was given is of the first alone then.");
    module.def(
        "layer_forward",
        [](const Held& gate, const Held& up, const Held& down, const py::object& gate_mixtures,
           const py::object& up_mixtures, const py::object& down_mixtures, const std::string& dtype,
           int activation, std::int64_t experts, const Vector<std::int64_t>& picked,
           const Vector<float>& weights, const py::array& tokens, py::array& out, int threads) {
            const DType kind = parse_dtype("tokens", dtype);
            for (const Held* held : {&gate, &up, &down}) {
                if (held->experts != experts)
                    throw std::invalid_argument("experts: expected as many as every family has matrices");
            }
            LayerView layer{gate.view, up.view, down.view, experts, static_cast<Activation>(activation)};
            layer.gate.mixtures = addresses(gate_mixtures, experts);
            layer.up.mixtures = addresses(up_mixtures, experts);
            layer.down.mixtures = addresses(down_mixtures, experts);
            const auto x = const_matrix("tokens", tokens, kind);
            const auto y = matrix("out", out, kind);
            if (picked.ndim() != 2 || picked.shape(0) != x.rows || weights.ndim() != 2 ||
                weights.shape(0) != x.rows || weights.shape(1) != picked.shape(1))
                throw std::invalid_argument("weights: expected one for each expert of each token");
            const Routing routing{picked.data(), weights.data(), picked.shape(1)};
            without_gil([&] { layer_forward(layer, routing, x, y, threads); });
        },
        py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("gate_mixtures"), py::arg("up_mixtures"),
        py::arg("down_mixtures"), py::arg("dtype"), py::arg("activation"), py::arg("experts"),
        py::arg("picked").noconvert(), py::arg("weights").noconvert(), py::arg("tokens"), py::arg("out"),
        py::arg("threads"), "What the experts of a layer make of tokens; mixtures are addresses, or None.");
}

}  // namespace globe::bindings
