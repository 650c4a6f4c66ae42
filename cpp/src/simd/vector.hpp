// Vectors of the compiler (GCC and Clang), as wide as the instruction set has them, and the 16-bit types.
// Included by variant.cpp alone: everything has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace globe::detail::GLOBE_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

using F32 = float __attribute__((vector_size(4 * lanes)));
using U32 = std::uint32_t __attribute__((vector_size(4 * lanes)));
using I32 = std::int32_t __attribute__((vector_size(4 * lanes)));
using U16 = std::uint16_t __attribute__((vector_size(2 * lanes)));
using F64 = double __attribute__((vector_size(4 * lanes)));  // lanes / 2 of them

#define GLOBE_INLINE inline __attribute__((always_inline))

template <class To, class From>
GLOBE_INLINE To bits_of(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "only between types of one size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

template <class Vector>
GLOBE_INLINE Vector load(const void* from) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <class Vector>
GLOBE_INLINE void store(void* to, const Vector& value) {
    __builtin_memcpy(to, &value, sizeof value);
}

// Copies a multiple of 16 bytes past the caches, where the machine can; both ends are aligned to 16.
GLOBE_INLINE void stream_out(void* to, const void* from, std::size_t bytes) {
#if defined(__AVX512F__)
    if (bytes % 64 == 0) {
        for (std::size_t i = 0; i < bytes; i += 64) {
            _mm512_stream_si512(static_cast<__m512i*>(to) + i / 64,
                                load<__m512i>(static_cast<const char*>(from) + i));
        }
        return;
    }
#endif
#if defined(__x86_64__)
    for (std::size_t i = 0; i < bytes; i += 16) {
        _mm_stream_si128(static_cast<__m128i*>(to) + i / 16,
                         load<__m128i>(static_cast<const char*>(from) + i));
    }
#else
    __builtin_memcpy(to, from, bytes);
#endif
}

// After the last stream_out, before another thread may look.
GLOBE_INLINE void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

GLOBE_INLINE F32 splat(float value) {
    return value - F32{};  // value - 0, so that -0 stays
}

GLOBE_INLINE U32 select(I32 mask, U32 yes, U32 no) {
    return (bits_of<U32>(mask) & yes) | (~bits_of<U32>(mask) & no);
}

// Adds the lanes two by two, in an order that does not depend on the data.
template <class Vector>
GLOBE_INLINE auto sum_of(const Vector& value) {
    constexpr int count = sizeof(Vector) / sizeof(value[0]);
    double parts[count];
    for (int i = 0; i < count; ++i) parts[i] = value[i];
    for (int width = count / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    }
    return parts[0];
}

// Two vectors of 2 * lanes consecutive entries; with `split`, those of even and of odd places.
struct Pair {
    F32 first, second;
};

GLOBE_INLINE Pair interleave(const Pair& x) {
    F32 low, high;
#if defined(__AVX512F__)
    const auto a = bits_of<__m512>(x.first), b = bits_of<__m512>(x.second);
    const __m512i to_low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i to_high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    low = bits_of<F32>(_mm512_permutex2var_ps(a, to_low, b));
    high = bits_of<F32>(_mm512_permutex2var_ps(a, to_high, b));
#else
    for (int i = 0; i < lanes / 2; ++i) {
        low[2 * i] = x.first[i];
        low[2 * i + 1] = x.second[i];
        high[2 * i] = x.first[lanes / 2 + i];
        high[2 * i + 1] = x.second[lanes / 2 + i];
    }
#endif
    return {low, high};
}

struct Float32 {
    using Storage = float;
    static constexpr bool split = false;
    static GLOBE_INLINE float load_one(const Storage* from) { return *from; }
    static GLOBE_INLINE void store_one(Storage* to, float value) { *to = value; }
    static GLOBE_INLINE F32 load_vector(const Storage* from) { return load<F32>(from); }
    static GLOBE_INLINE Pair load_pair(const Storage* from) {
        return {load<F32>(from), load<F32>(from + lanes)};
    }
    static GLOBE_INLINE void store_pair(Storage* to, const Pair& x) {
        store(to, x.first);
        store(to + lanes, x.second);
    }
};

struct BFloat16 {
    using Storage = std::uint16_t;
    static constexpr bool split = true;

    template <class Unsigned, class Signed>
    static GLOBE_INLINE Unsigned round(Unsigned bits) {
        const Unsigned rounded = bits + 0x7FFFU + ((bits >> 16) & 1U);
        if constexpr (sizeof(Unsigned) == 4) {
            return (bits & 0x7FFFFFFFU) > 0x7F800000U ? (bits | 0x400000U) : rounded;
        } else {
            const Signed nan = bits_of<Signed>(bits & 0x7FFFFFFFU) > 0x7F800000;
            return select(nan, bits | 0x400000U, rounded);
        }
    }
    static GLOBE_INLINE float load_one(const Storage* from) {
        return bits_of<float>(static_cast<std::uint32_t>(*from) << 16);
    }
    static GLOBE_INLINE F32 load_vector(const Storage* from) {
        return bits_of<F32>(__builtin_convertvector(load<U16>(from), U32) << 16);
    }
    static GLOBE_INLINE void store_one(Storage* to, float value) {
        *to = static_cast<Storage>(round<std::uint32_t, std::int32_t>(bits_of<std::uint32_t>(value)) >> 16);
    }
    static GLOBE_INLINE Pair load_pair(const Storage* from) {
        const U32 both = load<U32>(from);
        return {bits_of<F32>(both << 16), bits_of<F32>(both & 0xFFFF0000U)};
    }
    // Of each lane; the lower half is left to chance.
    static GLOBE_INLINE U32 round_vector(const F32& x) {
#if defined(__AVX512F__)
        const auto bits = bits_of<__m512i>(x);
        const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), tie);
        const __mmask16 nan = _mm512_cmp_ps_mask(bits_of<__m512>(x), bits_of<__m512>(x), _CMP_UNORD_Q);
        return bits_of<U32>(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)));
#else
        return round<U32, I32>(bits_of<U32>(x));
#endif
    }
    static GLOBE_INLINE void store_pair(Storage* to, const Pair& x) {
        store(to, (round_vector(x.first) >> 16) | (round_vector(x.second) & 0xFFFF0000U));
    }
};

struct Float16 {
    using Storage = std::uint16_t;
    static constexpr bool split = false;

    // Widen the mantissa, then multiply by 2^112 to correct the exponent; subnormals come out right.
    static GLOBE_INLINE float load_one(const Storage* from) {
        const std::uint32_t magnitude = *from & 0x7FFFU;
        const auto scaled =
            bits_of<std::uint32_t>(bits_of<float>(magnitude << 13) * bits_of<float>(0x77800000U));
        const std::uint32_t special = magnitude >= 0x7C00U ? 0x7F800000U : 0U;
        return bits_of<float>(scaled | special | (static_cast<std::uint32_t>(*from & 0x8000U) << 16));
    }
    static GLOBE_INLINE void store_one(Storage* to, float value) {
        const auto bits = bits_of<std::uint32_t>(value);
        const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
        const std::uint32_t normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
        // Adding 0.5 lets the hardware round to the spacing of subnormals.
        const std::uint32_t subnormal =
            bits_of<std::uint32_t>(bits_of<float>(magnitude) + 0.5F) - 0x3F000000U;
        const std::uint32_t special = magnitude > 0x7F800000U ? 0x7E00U : 0x7C00U;
        const std::uint32_t finite = magnitude < 0x38800000U ? subnormal : normal;
        *to = static_cast<Storage>((magnitude >= 0x47800000U ? special : finite) | ((bits >> 16) & 0x8000U));
    }
    static GLOBE_INLINE F32 load_vector(const Storage* from) {
#if defined(__AVX512F__)
        return bits_of<F32>(_mm512_cvtph_ps(load<__m256i>(from)));
#elif defined(__F16C__)
        return bits_of<F32>(_mm256_cvtph_ps(load<__m128i>(from)));
#else
        F32 value;
        for (int i = 0; i < lanes; ++i) value[i] = load_one(from + i);
        return value;
#endif
    }
    static GLOBE_INLINE void store_vector(Storage* to, const F32& value) {
#if defined(__AVX512F__)
        store(to, _mm512_cvtps_ph(bits_of<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
        store(to, _mm256_cvtps_ph(bits_of<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < lanes; ++i) store_one(to + i, value[i]);
#endif
    }
    static GLOBE_INLINE Pair load_pair(const Storage* from) {
        return {load_vector(from), load_vector(from + lanes)};
    }
    static GLOBE_INLINE void store_pair(Storage* to, const Pair& x) {
        store_vector(to, x.first);
        store_vector(to + lanes, x.second);
    }
};

}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
