// Inner loops of gram. Included by variant.cpp alone.
//
// Rows are packed in panels: panel p holds, for every step, one 32-bit word of each of its rows. A word is a
// float32, or two consecutive bfloat16 where the machine multiplies those. A panel serves as either factor.
#pragma once

#include "../variant.hpp"
#include "vector.hpp"

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

namespace globe::detail::GLOBE_VARIANT {
namespace {
namespace gram {

#if defined(__AVX512F__)
constexpr int vectors = 2, height = 8;  // 16 sums of 32 registers
#else
constexpr int vectors = 3, height = 4;  // 12 sums of 16 registers
#endif
constexpr int panel = vectors * lanes;
constexpr std::int64_t run = 128;  // steps whose products are added up one after the other

// Words of `lanes` rows, transposed: out[s] holds word s of every row. A perfect shuffle per stage.
GLOBE_INLINE void transpose(F32 (&rows)[lanes]) {
    for (int stage = 1; stage < lanes; stage *= 2) {
        F32 shuffled[lanes];
        for (int i = 0; i < lanes / 2; ++i) {
            const Pair both = interleave({rows[i], rows[i + lanes / 2]});
            shuffled[2 * i] = both.first;
            shuffled[2 * i + 1] = both.second;
        }
        for (int i = 0; i < lanes; ++i) rows[i] = shuffled[i];
    }
}

// A word is `per_word` entries of a row; `read` gives `lanes` words from a place in a row.
template <class Entry, int per_word, class Read, class ReadOne>
GLOBE_INLINE void pack_words(const PanelSource& source, std::uint32_t* to, const Read& read,
                             const ReadOne& read_one) {
    const std::int64_t steps = (source.depth + per_word - 1) / per_word, whole = source.depth / per_word;
    for (int group = 0; group < panel; group += lanes) {
        const Entry* rows[lanes];
        for (int i = 0; i < lanes; ++i) {
            const std::int64_t row = group + i < source.rows ? group + i : 0;
            rows[i] = reinterpret_cast<const Entry*>(source.data + row * source.stride);
        }
        std::int64_t step = 0;
        for (; step + lanes <= whole; step += lanes) {
            F32 block[lanes];
            for (int i = 0; i < lanes; ++i) block[i] = read(rows[i] + step * per_word, step);
            transpose(block);
            for (int s = 0; s < lanes; ++s) store(to + (step + s) * panel + group, block[s]);
        }
        for (; step < steps; ++step) {
            for (int i = 0; i < lanes; ++i) {
                to[step * panel + group + i] =
                    read_one(rows[i] + step * per_word, step, source.depth - step * per_word);
            }
        }
    }
    // Rows that are not there are zero.
    for (std::int64_t step = 0; step < steps; ++step) {
        for (std::int64_t row = source.rows; row < panel; ++row) to[step * panel + row] = 0;
    }
}

template <class In>
void pack_float32(const PanelSource& source, std::uint32_t* to) {
    using Entry = typename In::Storage;
    const float* roots = source.roots;
    pack_words<Entry, 1>(
        source, to,
        [roots](const Entry* from, std::int64_t step) {
            const F32 x = In::load_vector(from);
            return roots == nullptr ? x : x * load<F32>(roots + step);
        },
        [roots](const Entry* from, std::int64_t step, std::int64_t) {
            const float x = In::load_one(from);
            return bits_of<std::uint32_t>(roots == nullptr ? x : x * roots[step]);
        });
}

// sum + word * other, word by word. Values and casts, not references: the sums must stay in registers.
struct MultiplyFloat32 {
    static GLOBE_INLINE F32 step(F32 sum, std::uint32_t word, F32 other) {
        return sum + splat(bits_of<float>(word)) * other;
    }
};

#if defined(__AVX512BF16__)
#define GLOBE_BFLOAT16_DOT 1
struct MultiplyBFloat16 {
    static GLOBE_INLINE F32 step(F32 sum, std::uint32_t word, F32 other) {
        const __m512i both = _mm512_set1_epi32(static_cast<int>(word));
        return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)other);
    }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define GLOBE_BFLOAT16_DOT 1
struct MultiplyBFloat16 {
    static GLOBE_INLINE F32 step(F32 sum, std::uint32_t word, F32 other) {
        const uint32x4_t both = vdupq_n_u32(word);
        return (F32)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)both, (bfloat16x8_t)other);
    }
};
#endif

#if defined(GLOBE_BFLOAT16_DOT)
using Halves = std::uint16_t __attribute__((vector_size(4 * lanes)));

// As they are. Whether one is below the normal numbers, which the instructions take as zero.
bool pack_bfloat16(const PanelSource& source, std::uint32_t* to) {
    constexpr std::uint16_t magnitude = 0x7FFF, one = 1, normal = 0x80;
    Halves least = ~Halves{};  // of magnitudes less one: zero comes last
    std::uint16_t least_single = magnitude;
    const auto look = [&least_single](std::uint32_t entry) {
        const auto below = static_cast<std::uint16_t>((entry & magnitude) - 1U);
        least_single = below < least_single ? below : least_single;
        return entry;
    };
    pack_words<std::uint16_t, 2>(
        source, to,
        [&least](const std::uint16_t* from, std::int64_t) {
            const F32 words = load<F32>(from);
            const Halves below = (bits_of<Halves>(words) & magnitude) - one;
            least = below < least ? below : least;
            return words;
        },
        [&look](const std::uint16_t* from, std::int64_t, std::int64_t left) {
            return look(from[0]) | (left > 1 ? look(from[1]) << 16 : 0U);
        });
    for (int i = 0; i < 2 * lanes; ++i) least_single = least[i] < least_single ? least[i] : least_single;
    return least_single < normal - one;
}
#endif

// The first `rows` x `cols` entries of (panel a) (panel b)^T are added to gram.
template <class Multiply>
void multiply(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, double* gram,
              std::int64_t stride, std::int64_t rows, std::int64_t cols) {
    for (int top = 0; top < panel && top < rows; top += height) {
        F32 totals[height][vectors] = {};
        for (std::int64_t begin = 0; begin < steps; begin += run) {
            const std::int64_t end = begin + run < steps ? begin + run : steps;
            F32 sums[height][vectors] = {};
            for (std::int64_t step = begin; step < end; ++step) {
                F32 other[vectors];
                for (int v = 0; v < vectors; ++v) other[v] = load<F32>(b + step * panel + v * lanes);
                for (int i = 0; i < height; ++i) {
                    const std::uint32_t word = a[step * panel + top + i];
                    for (int v = 0; v < vectors; ++v) sums[i][v] = Multiply::step(sums[i][v], word, other[v]);
                }
            }
            for (int i = 0; i < height; ++i) {
                for (int v = 0; v < vectors; ++v) totals[i][v] += sums[i][v];
            }
        }
        for (int i = 0; i < height && top + i < rows; ++i) {
            double* to = gram + (top + i) * stride;
            float line[panel];
            for (int v = 0; v < vectors; ++v) store(line + v * lanes, totals[i][v]);
            if (cols == panel) {
                for (int j = 0; j < panel; ++j) to[j] += static_cast<double>(line[j]);
            } else {
                for (int j = 0; j < cols; ++j) to[j] += static_cast<double>(line[j]);
            }
        }
    }
}

constexpr GramKernels kernels = {
    panel,
    {pack_float32<Float32>, pack_float32<Float16>, pack_float32<BFloat16>},
    multiply<MultiplyFloat32>,
#if defined(GLOBE_BFLOAT16_DOT)
    pack_bfloat16,
    multiply<MultiplyBFloat16>,
#else
    nullptr,
    nullptr,
#endif
};

}  // namespace gram
}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
