// What kernels for float and double need beyond vector.hpp, by the type of one lane.
// Included by variant.cpp alone: everything has internal linkage.
#pragma once

#include "vector.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {

using U64 = std::uint64_t __attribute__((vector_size(4 * lanes)));

// The vector that holds lanes of a type, and the layout of that type's bits.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    using Vector = F32;
    using Bits = U32;
    static constexpr int count = lanes, mantissa_bits = 23;
    static constexpr float epsilon = 0x1p-23F, least = 0x1p-126F, greatest = 0x1.FFFFFEp127F;
};

template <>
struct Lanes<double> {
    using Vector = F64;
    using Bits = U64;
    static constexpr int count = lanes / 2, mantissa_bits = 52;
    static constexpr double epsilon = 0x1p-52, least = 0x1p-1022, greatest = 0x1.FFFFFFFFFFFFFp1023;
};

template <class T>
using VectorOf = typename Lanes<T>::Vector;

template <class T>
GLOBE_INLINE VectorOf<T> broadcast(T value) {
    return value - VectorOf<T>{};
}

// b where a is NaN, as the machine does it.
template <class Vector>
GLOBE_INLINE Vector larger(const Vector& a, const Vector& b) {
    return a > b ? a : b;
}

// One bit per lane, set where the lane is above 0.
template <class T>
GLOBE_INLINE std::uint32_t positive(const VectorOf<T>& x) {
    [[maybe_unused]] constexpr bool single = sizeof(T) == 4;
#if defined(__AVX512F__)
    if constexpr (single) return _mm512_cmp_ps_mask(bits_of<__m512>(x), _mm512_setzero_ps(), _CMP_GT_OQ);
    if constexpr (!single) return _mm512_cmp_pd_mask(bits_of<__m512d>(x), _mm512_setzero_pd(), _CMP_GT_OQ);
#elif defined(__AVX2__)
    if constexpr (single) return static_cast<std::uint32_t>(_mm256_movemask_ps(bits_of<__m256>(x > T(0))));
    if constexpr (!single) return static_cast<std::uint32_t>(_mm256_movemask_pd(bits_of<__m256d>(x > T(0))));
#elif defined(__x86_64__)
    if constexpr (single) return static_cast<std::uint32_t>(_mm_movemask_ps(bits_of<__m128>(x > T(0))));
    if constexpr (!single) return static_cast<std::uint32_t>(_mm_movemask_pd(bits_of<__m128d>(x > T(0))));
#else
    std::uint32_t mask = 0;
    for (int i = 0; i < Lanes<T>::count; ++i) mask |= static_cast<std::uint32_t>(x[i] > T(0)) << i;
    return mask;
#endif
}

// Writes the lanes whose bit is set to to[0], to[1], ... and returns how many. May write a whole vector.
template <class T>
GLOBE_INLINE int compress(T* to, const VectorOf<T>& x, std::uint32_t mask) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), bits_of<__m512>(x)));
    } else {
        _mm512_storeu_pd(to, _mm512_maskz_compress_pd(static_cast<__mmask8>(mask), bits_of<__m512d>(x)));
    }
    return __builtin_popcount(mask);
#else
    T parts[Lanes<T>::count];
    store(parts, x);
    int found = 0;
    for (; mask != 0; mask &= mask - 1) to[found++] = parts[__builtin_ctz(mask)];
    return found;
#endif
}

// The first `count` lanes from memory, the others `fill`.
template <class T>
GLOBE_INLINE VectorOf<T> load_some(const T* from, std::int64_t count, T fill) {
#if defined(__AVX512F__)
    const std::uint32_t mask = (1U << count) - 1U;
    const VectorOf<T> rest = broadcast(fill);
    if constexpr (sizeof(T) == 4) {
        return bits_of<F32>(_mm512_mask_loadu_ps(bits_of<__m512>(rest), static_cast<__mmask16>(mask), from));
    } else {
        return bits_of<F64>(_mm512_mask_loadu_pd(bits_of<__m512d>(rest), static_cast<__mmask8>(mask), from));
    }
#else
    VectorOf<T> x = broadcast(fill);
    for (int i = 0; i < Lanes<T>::count; ++i) {
        if (i < count) x[i] = from[i];
    }
    return x;
#endif
}

// Stores the first `count` lanes.
template <class T>
GLOBE_INLINE void store_some(T* to, const VectorOf<T>& x, std::int64_t count) {
#if defined(__AVX512F__)
    const std::uint32_t mask = (1U << count) - 1U;
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), bits_of<__m512>(x));
    if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), bits_of<__m512d>(x));
#else
    for (int i = 0; i < Lanes<T>::count; ++i) {
        if (i < count) to[i] = x[i];
    }
#endif
}

// Sum of the lanes, two by two, in their own type.
template <class T>
GLOBE_INLINE T total_of(const VectorOf<T>& x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(bits_of<__m512>(x));
    if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd(bits_of<__m512d>(x));
#else
    T parts[Lanes<T>::count];
    store(parts, x);
    for (int width = Lanes<T>::count / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    }
    return parts[0];
#endif
}

template <class T>
GLOBE_INLINE T largest_of(const VectorOf<T>& x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps(bits_of<__m512>(x));
    if constexpr (sizeof(T) == 8) return _mm512_reduce_max_pd(bits_of<__m512d>(x));
#else
    T parts[Lanes<T>::count];
    store(parts, x);
    for (int width = Lanes<T>::count / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) parts[i] = parts[i] > parts[i + width] ? parts[i] : parts[i + width];
    }
    return parts[0];
#endif
}

GLOBE_INLINE float root(float x) {
    return __builtin_sqrtf(x);
}
GLOBE_INLINE double root(double x) {
    return __builtin_sqrt(x);
}

GLOBE_INLINE F32 root(const F32& x) {
#if defined(__AVX512F__)
    return bits_of<F32>(_mm512_sqrt_ps(bits_of<__m512>(x)));
#else
    F32 result;
    for (int i = 0; i < Lanes<float>::count; ++i) result[i] = __builtin_sqrtf(x[i]);
    return result;
#endif
}

GLOBE_INLINE F64 root(const F64& x) {
#if defined(__AVX512F__)
    return bits_of<F64>(_mm512_sqrt_pd(bits_of<__m512d>(x)));
#else
    F64 result;
    for (int i = 0; i < Lanes<double>::count; ++i) result[i] = __builtin_sqrt(x[i]);
    return result;
#endif
}

}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
