// Checks that kernels share.
#pragma once

#include <stdexcept>
#include <string>

#include "globe/view.hpp"

namespace globe::detail {

// `told` makes the message: nothing is made where all is well.
template <class Told>
auto require(bool condition, const Told& told) -> decltype(told(), void()) {
    if (!condition) throw std::invalid_argument(told());
}

inline void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

inline std::string shape_of(std::int64_t rows, std::int64_t cols) {
    return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
}

// Rows [begin, end) of the codes, which are then safe to read. `codes` is not read before its sizes are.
void check_codes(const CsrView& codes, const ConstMatrixView& bank, std::int64_t begin, std::int64_t end);

}  // namespace globe::detail
