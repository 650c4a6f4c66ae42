// How families of architectures name the tensors of their routed experts:
// python/globe/checkpoint/layouts.json.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace globe::detail {

struct Place {
    std::int64_t layer, expert;  // -1: all experts of the layer, gate above up
};

// The names of one layout; `named` in the order of Family: the name of one expert's matrix, and that of the
// tensor of all experts of a layer, either of which may be empty.
struct Layout {
    struct Templates {
        std::string single, fused;
    };
    std::array<Templates, 3> named;

    std::optional<Place> place(std::size_t family, std::string_view tensor) const;
};

// Throws Damaged where there is no layout of that name.
Layout layout_of(const std::string& name);

}  // namespace globe::detail
