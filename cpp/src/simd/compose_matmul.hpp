// Inner loops of compose_matmul. Included by variant.cpp alone.
#pragma once

#include "../variant.hpp"
#include "compose.hpp"
#include "gram.hpp"
#include "vector.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {
namespace compose_matmul {

constexpr std::int64_t ahead = 1024;  // bytes of an atom that are asked for before they are read

// Tokens as float32, in the order in which pairs of vectors of the bank come.
template <class In, class X>
void arrange(const void* from, std::int64_t width, float* to) {
    const auto* x = static_cast<const typename X::Storage*>(from);
    constexpr int wide = 2 * lanes;
    std::int64_t t = 0;
    for (; t + wide <= width; t += wide) {
        if constexpr (In::split == X::split) {
            Float32::store_pair(to + t, X::load_pair(x + t));
        } else {
            for (int i = 0; i < lanes; ++i) {
                to[t + i] = X::load_one(x + t + (In::split ? 2 * i : i));
                to[t + lanes + i] = X::load_one(x + t + (In::split ? 2 * i + 1 : lanes + i));
            }
        }
    }
    for (; t < width; ++t) to[t] = X::load_one(x + t);
}

// Adds to sums[t] the products of some columns of the mixture with a token's.
template <class In, int pairs>
GLOBE_INLINE void add_block(const MixtureRow& row, std::int64_t from, const float* x, std::int64_t pitch,
                            std::int64_t tokens, Pair* sums) {
    Pair mixture[pairs] = {};
    for (std::int64_t k = 0; k < row.count; ++k) {
        const auto* atom =
            reinterpret_cast<const typename In::Storage*>(row.atoms + row.terms[k].offset) + from;
        for (std::size_t line = 0; line < pairs * 2 * lanes * sizeof *atom; line += 64) {
            __builtin_prefetch(reinterpret_cast<const char*>(atom) + ahead + line);
        }
        const F32 weight = splat(row.terms[k].weight);
        for (int v = 0; v < pairs; ++v) {
            const Pair entries = In::load_pair(atom + v * 2 * lanes);
            mixture[v].first += weight * entries.first;
            mixture[v].second += weight * entries.second;
        }
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
        Pair sum = sums[t];
        for (int v = 0; v < pairs; ++v) {
            const Pair other = Float32::load_pair(x + t * pitch + from + v * 2 * lanes);
            sum.first += mixture[v].first * other.first;
            sum.second += mixture[v].second * other.second;
        }
        sums[t] = sum;
    }
}

// out[t] = one row of a mixture times token t, for at most `few` tokens.
template <class In>
void multiply_row(const MixtureRow& row, const float* x, std::int64_t pitch, std::int64_t tokens,
                  float* out) {
    constexpr int wide = 8 * lanes, narrow = 2 * lanes;
    Pair sums[few_tokens] = {};
    std::int64_t from = 0;
    for (; from + wide <= row.width; from += wide) add_block<In, 4>(row, from, x, pitch, tokens, sums);
    for (; from + narrow <= row.width; from += narrow) add_block<In, 1>(row, from, x, pitch, tokens, sums);
    for (std::int64_t t = 0; t < tokens; ++t)
        out[t] = static_cast<float>(sum_of(sums[t].first + sums[t].second));
    for (; from < row.width; ++from) {
        float mixture = 0.0F;
        for (std::int64_t k = 0; k < row.count; ++k) {
            const auto* atom = reinterpret_cast<const typename In::Storage*>(row.atoms + row.terms[k].offset);
            mixture += row.terms[k].weight * In::load_one(atom + from);
        }
        for (std::int64_t t = 0; t < tokens; ++t) out[t] += mixture * x[t * pitch + from];
    }
}

// Adds a tile's products with a panel of tokens: sums[i * panel + t] += <row i of the tile, token t>. Words
// of the tile are `pitch` apart from row to row; those of the tokens are packed as gram packs vectors.
template <class Multiply, int rows, int vectors>
GLOBE_INLINE void multiply_some(const std::uint32_t* tile, std::int64_t pitch, const std::uint32_t* x,
                                std::int64_t steps, float* sums) {
    F32 totals[rows][vectors];
    for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < vectors; ++v) totals[i][v] = load<F32>(sums + i * gram::panel + v * lanes);
    }
    for (std::int64_t k = 0; k < steps; ++k) {
        F32 other[vectors];
        for (int v = 0; v < vectors; ++v) other[v] = load<F32>(x + k * gram::panel + v * lanes);
        for (int i = 0; i < rows; ++i) {
            const std::uint32_t word = tile[i * pitch + k];
            for (int v = 0; v < vectors; ++v) totals[i][v] = Multiply::step(totals[i][v], word, other[v]);
        }
    }
    for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < vectors; ++v) store(sums + i * gram::panel + v * lanes, totals[i][v]);
    }
}

template <class Multiply, int vectors>
GLOBE_INLINE void multiply_rows(const MixtureTile& tile, const std::uint32_t* x, float* sums) {
    constexpr int height = gram::height * gram::vectors / vectors;  // as many sums, whatever the vectors
    std::int64_t i = 0;
    for (; i + height <= tile.rows; i += height) {
        multiply_some<Multiply, height, vectors>(tile.words + i * tile.pitch, tile.pitch, x, tile.steps,
                                                 sums + i * gram::panel);
    }
    for (; i < tile.rows; ++i) {
        multiply_some<Multiply, 1, vectors>(tile.words + i * tile.pitch, tile.pitch, x, tile.steps,
                                            sums + i * gram::panel);
    }
}

template <class Multiply>
void multiply_tile(const MixtureTile& tile, const std::uint32_t* x, std::int64_t tokens, float* sums) {
    if (tokens <= lanes) return multiply_rows<Multiply, 1>(tile, x, sums);
    if (tokens <= 2 * lanes || gram::vectors == 2) return multiply_rows<Multiply, 2>(tile, x, sums);
    multiply_rows<Multiply, gram::vectors>(tile, x, sums);
}

constexpr ComposeMatmulKernels kernels = {
    {{arrange<Float32, Float32>, arrange<Float32, Float16>, arrange<Float32, BFloat16>},
     {arrange<Float16, Float32>, arrange<Float16, Float16>, arrange<Float16, BFloat16>},
     {arrange<BFloat16, Float32>, arrange<BFloat16, Float16>, arrange<BFloat16, BFloat16>}},
    {multiply_row<Float32>, multiply_row<Float16>, multiply_row<BFloat16>},
    multiply_tile<gram::MultiplyFloat32>,
#if defined(GLOBE_BFLOAT16_DOT)
    multiply_tile<gram::MultiplyBFloat16>,
#else
    nullptr,
#endif
};

}  // namespace compose_matmul
}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
