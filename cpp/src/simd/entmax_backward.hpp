// Inner loops of the derivative of entmax: a range of rows. Included by variant.cpp alone.
#pragma once

#include "../variant.hpp"
#include "entmax.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {
namespace entmax {

// y^(2 - alpha) on the support, y > 0, and 0 elsewhere.
template <class T>
struct SparsemaxWeight {
    using Number = T;
    explicit SparsemaxWeight(const EntmaxTask&) {}
    GLOBE_INLINE VectorOf<T> operator()(const VectorOf<T>& y) const {
        const VectorOf<T> zero = {};
        return y > zero ? zero + T(1) : zero;
    }
};

template <class T>
struct Entmax15Weight {
    using Number = T;
    explicit Entmax15Weight(const EntmaxTask&) {}
    GLOBE_INLINE VectorOf<T> operator()(const VectorOf<T>& y) const { return root(larger(y, VectorOf<T>{})); }
};

template <class T>
struct GeneralWeight {
    using Number = T;
    VectorOf<T> power;
    explicit GeneralWeight(const EntmaxTask& task) : power(broadcast(static_cast<T>(2.0 - task.alpha))) {}
    GLOBE_INLINE VectorOf<T> operator()(const VectorOf<T>& y) const {
        // Logarithms are taken of normal numbers; alpha near 2 makes something of the smallest, too.
        constexpr int shift = Lanes<T>::mantissa_bits + 1;
        const VectorOf<T> zero = {}, lifted = y * T(std::uint64_t(1) << shift);
        const auto tiny = y < Lanes<T>::least;
        const VectorOf<T> u = tiny ? lifted : y;
        const VectorOf<T> log2 = log2_of<T>(u, u - T(1)) - (tiny ? zero + T(shift) : zero);
        return y > zero ? exp2_of<T>(power * log2) : zero;
    }
};

// dz = s (dy - <s, dy> / sum s) / T, with s the weights; dy off the support is not looked at.
template <class Weight, class T>
GLOBE_INLINE void backward_row(const Weight& weight, const T* row, const T* gradient, std::int64_t cols,
                               T inverse, T* out) {
    using Vector = VectorOf<T>;
    const Vector zero = {};
    Vector weights = {}, products = {};
    along(row, cols, T(0), [&](const Vector& y, std::int64_t i, std::int64_t count) {
        const Vector s = weight(y), dy = load_up_to(gradient + i, count, T(0));
        weights += s;
        products += s > zero ? s * dy : zero;
        put_up_to(out + i, s, count);
    });
    const T total = total_of<T>(weights);
    const T mean = total > T(0) ? total_of<T>(products) / total : T(0);
    along(out, cols, T(0), [&](const Vector& s, std::int64_t i, std::int64_t count) {
        const Vector dy = load_up_to(gradient + i, count, T(0));
        put_up_to(out + i, s > zero ? s * (dy - mean) * inverse : zero, count);
    });
}

template <class Weight>
void backward_range(const EntmaxTask& task, const void* in, const void* gradient, void* out) {
    using T = typename Weight::Number;
    const Weight weight(task);
    const auto inverse = static_cast<T>(1.0 / task.temperature);
    const auto* row = static_cast<const T*>(in);
    const auto* dy = static_cast<const T*>(gradient);
    auto* target = static_cast<T*>(out);
    for (std::int64_t i = 0; i < task.rows; ++i) {
        backward_row(weight, row, dy, task.cols, inverse, target);
        row += task.in_stride;
        dy += task.gradient_stride;
        target += task.out_stride;
    }
}

template <class T>
void backward(const EntmaxTask& task, const void* in, const void* gradient, void* out) {
    if (task.alpha == 2.0) return backward_range<SparsemaxWeight<T>>(task, in, gradient, out);
    if (task.alpha == 1.5) return backward_range<Entmax15Weight<T>>(task, in, gradient, out);
    return backward_range<GeneralWeight<T>>(task, in, gradient, out);
}

}  // namespace entmax
}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
