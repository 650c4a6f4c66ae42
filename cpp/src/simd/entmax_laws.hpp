// Entmax for one alpha: how shares follow from a threshold, and Newton's step towards the threshold.
// Included by variant.cpp alone: everything has internal linkage.
//
// With y = z - max(z), q = 1 / (alpha - 1) and u = (alpha - 1) y / T - tau, the shares are max(u, 0)^q and
// tau in [-1, 0) makes them sum to 1 (Peters, Niculae and Martins, ACL 2019). N(tau), the q-norm of max(u,
// 0), is convex and falls, so Newton's method on N = 1 climbs to tau from any threshold below it and never
// passes it. With s = sum of max(u, 0)^q and s' = sum of max(u, 0)^(q-1) its step is (s - s^((q-1)/q)) / s';
// for q = 1 it is Michelot's algorithm (J. Optim. Theory Appl. 50, 1986).
#pragma once

#include "power.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {
namespace entmax {

// max(u, 0)^q and max(u, 0)^(q-1).
template <class T>
struct Terms {
    VectorOf<T> share, slope;
};

// (alpha - 1) / T, kept where 0 and infinity times it are 0 and infinity.
template <class T>
GLOBE_INLINE VectorOf<T> scale_of(const EntmaxTask& task) {
    const double scale = (task.alpha - 1.0) / task.temperature;
    const double least = Lanes<T>::least, greatest = Lanes<T>::greatest;
    return broadcast(static_cast<T>(scale < least ? least : scale > greatest ? greatest : scale));
}

// alpha = 2, sparsemax.
template <class T>
struct Sparsemax {
    using Number = T;
    using Vector = VectorOf<T>;
    static constexpr T start = T(-1);  // a threshold at which s >= 1
    Vector scale;

    explicit Sparsemax(const EntmaxTask& task) : scale(scale_of<T>(task)) {}

    GLOBE_INLINE Vector above(const Vector& y, const Vector& tau) const { return y * scale - tau; }
    GLOBE_INLINE Vector share(const Vector& y, const Vector& tau) const {
        return larger(above(y, tau), Vector{});
    }
    GLOBE_INLINE Terms<T> terms(const Vector& y, const Vector& tau) const {
        const Vector u = above(y, tau), zero = {};
        return {larger(u, zero), u > zero ? zero + T(1) : zero};
    }
    GLOBE_INLINE T step(T shares, T slopes) const { return (shares - T(1)) / slopes; }
};

// alpha = 1.5.
template <class T>
struct Entmax15 {
    using Number = T;
    using Vector = VectorOf<T>;
    static constexpr T start = T(-1);
    Vector scale;

    explicit Entmax15(const EntmaxTask& task) : scale(scale_of<T>(task)) {}

    GLOBE_INLINE Vector above(const Vector& y, const Vector& tau) const { return y * scale - tau; }
    GLOBE_INLINE Vector share(const Vector& y, const Vector& tau) const {
        const Vector u = larger(above(y, tau), Vector{});
        return u * u;
    }
    GLOBE_INLINE Terms<T> terms(const Vector& y, const Vector& tau) const {
        const Vector u = larger(above(y, tau), Vector{});
        return {u * u, u};
    }
    GLOBE_INLINE T step(T shares, T slopes) const { return (shares - root(shares)) / slopes; }
};

// Any alpha in (1, 2]. The threshold is kept as tau + 1, which alpha close to 1 needs: u is then close to 1,
// and its logarithm is found from u - 1.
template <class T>
struct GeneralEntmax {
    using Number = T;
    using Vector = VectorOf<T>;
    static constexpr T start = T(0);
    Vector scale, less_one;  // q - 1
    T inverse;               // 1 / q

    explicit GeneralEntmax(const EntmaxTask& task)
        : scale(scale_of<T>(task)),
          less_one(broadcast(static_cast<T>((2.0 - task.alpha) / (task.alpha - 1.0)))),
          inverse(static_cast<T>(task.alpha - 1.0)) {}

    GLOBE_INLINE Vector above(const Vector& y, const Vector& tau) const { return (y * scale - tau) + T(1); }
    GLOBE_INLINE Vector share(const Vector& y, const Vector& tau) const { return terms(y, tau).share; }
    GLOBE_INLINE Terms<T> terms(const Vector& y, const Vector& tau) const {
        const Vector less = y * scale - tau, u = less + T(1), zero = {};
        const Vector slope = u > zero ? exp2_of<T>(less_one * log2_of<T>(u, less)) : zero;
        return {slope * larger(u, zero), slope};
    }
    // s^(-1/q) = exp(-a); exp(a) is cut after four terms, which shortens the step and cancels nothing.
    GLOBE_INLINE T step(T shares, T slopes) const {
        const T a =
            T(0.69314718055994530942) * inverse * log2_of<T>(broadcast(shares), broadcast(shares - T(1)))[0];
        const T expm1 = a * (T(1) + a * (T(0.5) + a * T(1.0 / 6)));
        return shares * (expm1 / (T(1) + expm1)) / slopes;
    }
};

}  // namespace entmax
}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
