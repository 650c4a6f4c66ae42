// Powers by lanes: 2^(p log2 u). The polynomials interpolate at Chebyshev nodes, to the precision of the
// type. Included by variant.cpp alone: everything has internal linkage.
#pragma once

#include "lanes.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {

// log2((1 + s) / (1 - s)) / s as a polynomial in s^2, for |s| <= (sqrt 2 - 1) / (sqrt 2 + 1); 2^r for |r| <=
// 1/2.
template <class T>
struct Series;

template <>
struct Series<float> {
    static constexpr float log2[] = {2.88539008F, 0.961798839F, 0.576715186F, 0.431717697F};
    static constexpr float exp2[] = {1.0F,           0.693147207F,   0.240226509F,   0.0555032723F,
                                     0.00961805668F, 0.00134004282F, 0.000154614447F};
};

template <>
struct Series<double> {
    static constexpr double log2[] = {2.8853900817779268115,  0.96179669392598972877, 0.5770780163455202295,
                                      0.41219858584090053448, 0.32059853491395986095, 0.26233435250418301904,
                                      0.22091308423117679618, 0.21365895694319269427};
    static constexpr double exp2[] = {1.0,
                                      0.69314718055994530925,
                                      0.24022650695910159567,
                                      0.055504108664821627039,
                                      0.0096181291075872566681,
                                      0.0013333558146406470697,
                                      0.00015403530463724354209,
                                      0.000015252733841556772589,
                                      1.3215432535912376166e-6,
                                      1.0178057087733941105e-7,
                                      7.0741942972885210056e-9,
                                      4.455817908336064493e-10};
};

template <class T, int size>
GLOBE_INLINE VectorOf<T> polynomial(const T (&coefficients)[size], const VectorOf<T>& x) {
    VectorOf<T> value = broadcast(coefficients[size - 1]);
    for (int i = size - 2; i >= 0; --i) value = value * x + coefficients[i];
    return value;
}

// log2(u) for normal u > 0, where less = u - 1 without the rounding that u near 1 may carry: exact to a few
// units in the last place even there.
template <class T>
GLOBE_INLINE VectorOf<T> log2_of(const VectorOf<T>& u, const VectorOf<T>& less) {
    using Bits = typename Lanes<T>::Bits;
    using Word = decltype(Bits{}[0] + Bits{}[0]);
    constexpr int shift = Lanes<T>::mantissa_bits;
    constexpr T root_half = T(0.70710678118654752440);
    const Word one = bits_of<Word>(T(1)), low = bits_of<Word>(root_half);
    constexpr T large = static_cast<T>(Word(1) << shift);
    // u = m 2^e with m in [root_half, 2 root_half)
    const Bits moved = bits_of<Bits>(u) + (one - low);
    const Bits exponent = moved >> shift;
    const auto m = bits_of<VectorOf<T>>((moved & ((Word(1) << shift) - 1)) + low);
    const auto e = bits_of<VectorOf<T>>(exponent | bits_of<Word>(large)) - (large + T(one >> shift));
    const VectorOf<T> f = e == T(0) ? less : m - T(1);
    const VectorOf<T> s = f / (f + T(2));
    return s * polynomial(Series<T>::log2, s * s) + e;
}

// 2^t for t at most 1; 0 where the result is no normal number.
template <class T>
GLOBE_INLINE VectorOf<T> exp2_of(const VectorOf<T>& t) {
    using Bits = typename Lanes<T>::Bits;
    using Word = decltype(Bits{}[0] + Bits{}[0]);
    constexpr int shift = Lanes<T>::mantissa_bits;
    constexpr T shifter = static_cast<T>(Word(3) << (shift - 1));  // its sum with t ends in round(t)
    constexpr T lowest = sizeof(T) == 4 ? T(-126) : T(-1022);
    const VectorOf<T> shifted = t + shifter;
    const VectorOf<T> value = polynomial(Series<T>::exp2, t - (shifted - shifter));
    const auto scaled = bits_of<VectorOf<T>>(bits_of<Bits>(value) + (bits_of<Bits>(shifted) << shift));
    return t > lowest ? scaled : VectorOf<T>{};
}

}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
