// Inner loops of qmatmul. Included by variant.cpp alone.
//
// Two 16-bit integers in a 32-bit word are multiplied with two others and added up at once. A word of packed
// weights gives 16 / bits of those: the lowest bits of its halves, then the next, and so on; activations are
// rounded to integers and paired in the same order. Lanes are rows of weights, so nothing is summed across
// lanes.
#pragma once

#include "../variant.hpp"
#include "vector.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {
namespace qmatmul {

#if defined(__AVX512F__)
constexpr int height = 12;  // tokens at once: 24 sums of 32 registers
#else
constexpr int height = 6;  // 12 sums of 16 registers
#endif
constexpr int vectors = 2, panel = vectors * lanes;
using Halves = std::uint16_t __attribute__((vector_size(4 * lanes)));
constexpr int unexpanded = 4;  // tokens for which weights are taken from their words as they are needed

// sum + low half of a * low half of b + high half of a * high half of b; a has no negative halves.
GLOBE_INLINE U32 add_products(const U32& sum, const U32& a, std::uint32_t b) {
#if defined(__AVX512VNNI__)
    const __m512i both = _mm512_set1_epi32(static_cast<int>(b));
    return bits_of<U32>(_mm512_dpwssd_epi32(bits_of<__m512i>(sum), bits_of<__m512i>(a), both));
#elif defined(__AVX512BW__)
    const __m512i both = _mm512_set1_epi32(static_cast<int>(b));
    return sum + bits_of<U32>(_mm512_madd_epi16(bits_of<__m512i>(a), both));
#elif defined(__AVX2__)
    const __m256i both = _mm256_set1_epi32(static_cast<int>(b));
    return sum + bits_of<U32>(_mm256_madd_epi16(bits_of<__m256i>(a), both));
#elif defined(__x86_64__)
    const __m128i both = _mm_set1_epi32(static_cast<int>(b));
    return sum + bits_of<U32>(_mm_madd_epi16(bits_of<__m128i>(a), both));
#else
    const auto low = static_cast<std::uint32_t>(static_cast<std::int32_t>(b << 16) >> 16);
    const auto high = static_cast<std::uint32_t>(static_cast<std::int32_t>(b) >> 16);
    return sum + (a & 0xFFFFU) * low + (a >> 16) * high;
#endif
}

// Of every four lanes: a0 b0 a1 b1 or a2 b2 a3 b3; with `pairs`, a0 a1 b0 b1 or a2 a3 b2 b3.
template <bool high, bool pairs>
GLOBE_INLINE U32 zip(const U32& a, const U32& b) {
#if defined(__AVX512F__)
    const auto x = bits_of<__m512i>(a), y = bits_of<__m512i>(b);
    if constexpr (pairs)
        return bits_of<U32>(high ? _mm512_unpackhi_epi64(x, y) : _mm512_unpacklo_epi64(x, y));
    return bits_of<U32>(high ? _mm512_unpackhi_epi32(x, y) : _mm512_unpacklo_epi32(x, y));
#elif defined(__AVX2__)
    const auto x = bits_of<__m256i>(a), y = bits_of<__m256i>(b);
    if constexpr (pairs)
        return bits_of<U32>(high ? _mm256_unpackhi_epi64(x, y) : _mm256_unpacklo_epi64(x, y));
    return bits_of<U32>(high ? _mm256_unpackhi_epi32(x, y) : _mm256_unpacklo_epi32(x, y));
#else
    constexpr int from = high ? 2 : 0;
    if constexpr (pairs) return U32{a[from], a[from + 1], b[from], b[from + 1]};
    return U32{a[from], b[from], a[from + 1], b[from + 1]};
#endif
}

// Four words of rows[0], rows[4], ..., from the k-th on.
GLOBE_INLINE U32 gather_four(const std::uint32_t* const* rows, std::int64_t k) {
#if defined(__AVX2__)
    const auto two = [k](const std::uint32_t* low, const std::uint32_t* high) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(low + k)),
                                       load<__m128i>(high + k), 1);
    };
#if defined(__AVX512F__)
    const __m512i low = _mm512_castsi256_si512(two(rows[0], rows[4]));
    return bits_of<U32>(_mm512_inserti64x4(low, two(rows[8], rows[12]), 1));
#else
    return bits_of<U32>(two(rows[0], rows[4]));
#endif
#else
    return load<U32>(rows[0] + k);
#endif
}

// Words of `panel` rows, transposed: to[k * panel + i] is word k of row i.
void transpose(const WordRows& source, std::uint32_t* to) {
    for (int group = 0; group < panel; group += lanes) {
        const std::uint32_t* rows[lanes];
        for (int i = 0; i < lanes; ++i) {
            rows[i] = source.words + (group + i < source.rows ? group + i : 0) * source.count;
        }
        std::int64_t k = 0;
        for (; k + 4 <= source.count; k += 4) {  // four words of rows i, i + 4, ... in a vector
            U32 four[4];
            for (int i = 0; i < 4; ++i) four[i] = gather_four(rows + i, k);
            const U32 a = zip<false, false>(four[0], four[1]), b = zip<false, false>(four[2], four[3]);
            const U32 c = zip<true, false>(four[0], four[1]), d = zip<true, false>(four[2], four[3]);
            std::uint32_t* place = to + k * panel + group;
            store(place, zip<false, true>(a, b));
            store(place + panel, zip<true, true>(a, b));
            store(place + 2 * panel, zip<false, true>(c, d));
            store(place + 3 * panel, zip<true, true>(c, d));
        }
        for (; k < source.count; ++k) {
            for (int i = 0; i < lanes; ++i) to[k * panel + group + i] = rows[i][k];
        }
    }
}

// Pair p of each word.
template <int bits>
GLOBE_INLINE U32 pair_of(const U32& word, int p) {
    constexpr int parts = 16 / bits;
    if (p + 1 == parts) return bits_of<U32>(bits_of<Halves>(word) >> (16 - bits));
    return (word >> (bits * p)) & (bits == 4 ? 0x000F000FU : 0x00FF00FFU);
}

// Pairs of a transposed panel, in the order in which they are multiplied.
template <int bits>
void expand(const std::uint32_t* words, std::int64_t count, std::uint32_t* pairs) {
    for (std::int64_t k = 0; k < count; ++k) {
        for (int v = 0; v < panel; v += lanes) {
            const U32 word = load<U32>(words + k * panel + v);
            for (int p = 0; p < 16 / bits; ++p) {
                store(pairs + (k * (16 / bits) + p) * panel + v, pair_of<bits>(word, p));
            }
        }
    }
}

// `bits` is that of the words, or 16 where the weights are pairs already.
template <int bits, int tokens>
void multiply_some(const QmatmulTask& task, std::int64_t first, float* out) {
    constexpr int parts = 16 / bits;
    F32 totals[tokens][vectors] = {};
    const std::uint32_t* x[tokens];
    for (int t = 0; t < tokens; ++t) x[t] = task.x + (first + t) * task.pitch;
    const std::uint32_t *weights = task.weights, *ahead = task.ahead;
    for (std::int64_t g = 0; g < task.groups; ++g) {
        U32 sums[tokens][vectors];
        for (int t = 0; t < tokens; ++t) {
            const U32 start = U32{} + static_cast<std::uint32_t>(task.starts[(first + t) * task.groups + g]);
            for (int v = 0; v < vectors; ++v) sums[t][v] = start;
        }
        for (std::int64_t k = 0; k < task.steps; ++k, weights += panel) {
            if constexpr (bits < 16) __builtin_prefetch(ahead + k * panel);
            for (int p = 0; p < parts; ++p) {
                U32 pairs[vectors];
                for (int v = 0; v < vectors; ++v) {
                    pairs[v] = load<U32>(weights + v * lanes);
                    if constexpr (bits < 16) pairs[v] = pair_of<bits>(pairs[v], p);
                }
                for (int t = 0; t < tokens; ++t) {
                    for (int v = 0; v < vectors; ++v) {
                        sums[t][v] = add_products(sums[t][v], pairs[v], x[t][k * parts + p]);
                    }
                }
            }
        }
        ahead += task.steps * panel;
        for (int t = 0; t < tokens; ++t) {
            const F32 step = splat(task.x_scales[(first + t) * task.groups + g]);
            for (int v = 0; v < vectors; ++v) {
                const F32 scale = load<F32>(task.scales + g * panel + v * lanes) * step;
                totals[t][v] += __builtin_convertvector(bits_of<I32>(sums[t][v]), F32) * scale;
            }
            x[t] += task.steps * parts;
        }
    }
    for (int t = 0; t < tokens; ++t) {
        for (int v = 0; v < vectors; ++v) store(out + (first + t) * panel + v * lanes, totals[t][v]);
    }
}

// As many tokens at once as there are, up to `most`.
template <int bits, int most>
void multiply(const QmatmulTask& task, float* out) {
    std::int64_t first = 0;
    for (; first + most <= task.tokens; first += most) multiply_some<bits, most>(task, first, out);
    if constexpr (most > 1) {
        if (first < task.tokens) {
            QmatmulTask rest = task;
            rest.tokens -= first;
            rest.x += first * task.pitch;
            rest.starts += first * task.groups;
            rest.x_scales += first * task.groups;
            multiply<bits, most - 1>(rest, out + first * panel);
        }
    }
}

// A token's row as integers of 16 bits in pairs, `parts` of which go with a word of weights.
template <class In>
void round_row(const void* from, const Rounding& rounding, std::uint32_t* pairs, float* scales,
               std::int32_t* starts) {
    constexpr std::uint32_t magnitude = 0x7FFFFFFFU;
    constexpr float to_whole = 0x1.8p23F;  // added to a small number, leaves it rounded in the lowest bits
    const auto* row = static_cast<const typename In::Storage*>(from);
    const int parts = rounding.parts;
    std::int32_t whole[256];
    for (std::int64_t g = 0; g < rounding.groups; ++g, row += rounding.group) {
        I32 most = {};
        std::int64_t t = 0;
        for (; t + lanes <= rounding.group; t += lanes) {
            const I32 size = bits_of<I32>(bits_of<U32>(In::load_vector(row + t)) & magnitude);
            most = size > most ? size : most;
        }
        std::int32_t largest = 0;
        for (int i = 0; i < lanes; ++i) largest = most[i] > largest ? most[i] : largest;
        for (std::int64_t s = t; s < rounding.group; ++s) {
            const auto size =
                static_cast<std::int32_t>(bits_of<std::uint32_t>(In::load_one(row + s)) & magnitude);
            largest = size > largest ? size : largest;
        }
        const std::int32_t exponent = largest >> 23 < 27 ? 27 : largest >> 23;  // biased; 2^114 is enough
        const bool finite = exponent < 255;
        const float factor = finite ? bits_of<float>((268 - exponent) << 23) : 0.0F;
        scales[g] = finite ? bits_of<float>((exponent - 14) << 23) : __builtin_nanf("");
        for (t = 0; finite && t + lanes <= rounding.group; t += lanes) {
            const I32 near = bits_of<I32>(In::load_vector(row + t) * factor + to_whole) - 0x4B400000;
            store(whole + t, near > 32767 ? I32{} + 32767 : near);
        }
        for (; t < rounding.group; ++t) {
            const float x = finite ? In::load_one(row + t) * factor : 0.0F;
            const std::int32_t near = bits_of<std::int32_t>(x + to_whole) - 0x4B400000;
            whole[t] = near > 32767 ? 32767 : near;
        }
        std::int32_t sum = 0;
        for (std::int64_t s = 0; s < rounding.group; s += 2 * parts) {
            for (int p = 0; p < parts; ++p) {
                const std::int32_t low = whole[s + p], high = whole[s + parts + p];
                *pairs++ = (static_cast<std::uint32_t>(low) & 0xFFFFU) | static_cast<std::uint32_t>(high)
                                                                             << 16;
                sum += low + high;
            }
        }
        starts[g] = -rounding.offset * sum;
    }
}

// Rows of scales as float32, without gaps.
template <class In>
void widen(const void* from, std::int64_t stride, std::int64_t rows, std::int64_t count, std::uint32_t* to) {
    for (std::int64_t i = 0; i < rows; ++i, to += count) {
        const auto* row = reinterpret_cast<const typename In::Storage*>(
            static_cast<const unsigned char*>(from) + i * stride);
        std::int64_t g = 0;
        for (; g + lanes <= count; g += lanes) store(to + g, In::load_vector(row + g));
        for (; g < count; ++g) to[g] = bits_of<std::uint32_t>(In::load_one(row + g));
    }
}

constexpr QmatmulKernels kernels = {
    panel,
    unexpanded,
    {round_row<Float32>, round_row<Float16>, round_row<BFloat16>},
    {widen<Float32>, widen<Float16>, widen<BFloat16>},
    transpose,
    {expand<4>, expand<8>},
    {multiply<4, unexpanded>, multiply<8, unexpanded>},
    multiply<16, height>,
};

}  // namespace qmatmul
}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
