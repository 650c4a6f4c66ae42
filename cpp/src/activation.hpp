// Activations of experts.
#pragma once

#include <cmath>
#include <string>

#include "codes.hpp"
#include "globe/expert.hpp"

namespace globe::detail {

inline void check_activation(Activation activation) {
    const auto number = static_cast<int>(activation);
    require(number >= 0 && number <= 3,
            [&] { return "activation: found " + std::to_string(number) + "; expected 0 to 3"; });
}

inline float activate(float x, Activation activation) {
    switch (activation) {
        case Activation::silu:
            return x / (1.0F + std::exp(-x));
        case Activation::gelu:
            return 0.5F * x * (1.0F + std::erf(x * 0.70710678118654752F));
        case Activation::gelu_tanh:
            return 0.5F * x * (1.0F + std::tanh(0.79788456080286536F * (x + 0.044715F * x * x * x)));
        case Activation::relu:
            return x > 0.0F || std::isnan(x) ? x : 0.0F;
    }
    return x;
}

}  // namespace globe::detail
