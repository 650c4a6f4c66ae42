// Inner loops of compose: one row of one tile. Included by variant.cpp alone.
#pragma once

#include "../variant.hpp"
#include "vector.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {

// Writes a pair of sums to `to`, whose entries are in order.
template <class In, class Out>
GLOBE_INLINE void put(typename Out::Storage* to, const Pair& sums) {
    if constexpr (In::split == Out::split) {
        Out::store_pair(to, sums);
    } else if constexpr (In::split) {
        Out::store_pair(to, interleave(sums));
    } else {
        for (int i = 0; i < lanes; ++i) {
            Out::store_one(to + i, sums.first[i]);
            Out::store_one(to + lanes + i, sums.second[i]);
        }
    }
}

// Keeps `pairs` pairs of sums in registers while all terms are added.
template <class In, class Out, int pairs>
GLOBE_INLINE void compose_block(const unsigned char* tile, const Term* terms, std::int64_t count,
                                typename Out::Storage* out, bool stream) {
    Pair sums[pairs] = {};
    for (std::int64_t k = 0; k < count; ++k) {
        const auto* atom = reinterpret_cast<const typename In::Storage*>(tile + terms[k].offset);
        const F32 weight = splat(terms[k].weight);
        for (int v = 0; v < pairs; ++v) {
            const Pair x = In::load_pair(atom + v * 2 * lanes);
            sums[v].first += weight * x.first;
            sums[v].second += weight * x.second;
        }
    }
    if (stream) {
        alignas(64) typename Out::Storage rounded[pairs * 2 * lanes];
        for (int v = 0; v < pairs; ++v) put<In, Out>(rounded + v * 2 * lanes, sums[v]);
        stream_out(out, rounded, sizeof rounded);
    } else {
        for (int v = 0; v < pairs; ++v) put<In, Out>(out + v * 2 * lanes, sums[v]);
    }
}

GLOBE_INLINE void ask_for(Ahead& ahead) {
    for (std::int64_t i = 0; i < ahead.step && ahead.row < ahead.rows; ++i) {
        __builtin_prefetch(ahead.base + ahead.starts[ahead.row] + ahead.at, 0, 2);
        ahead.at += 64;
        if (ahead.at >= ahead.bytes) {
            ahead.at = 0;
            ++ahead.row;
        }
    }
}

template <class In, class Out>
GLOBE_INLINE void compose_row(const unsigned char* atoms, const Term* terms, std::int64_t count,
                              std::int64_t width, typename Out::Storage* out, bool stream, Ahead& ahead) {
    constexpr int wide = 8 * lanes, narrow = 2 * lanes;
    constexpr auto entry = static_cast<std::int64_t>(sizeof(typename In::Storage));
    std::int64_t t = 0;
    for (; t + wide <= width; t += wide) {
        ask_for(ahead);
        compose_block<In, Out, 4>(atoms + t * entry, terms, count, out + t, stream);
    }
    for (; t + narrow <= width; t += narrow) {
        compose_block<In, Out, 1>(atoms + t * entry, terms, count, out + t, stream);
    }
    for (; t < width; ++t) {
        float sum = 0.0F;
        for (std::int64_t k = 0; k < count; ++k) {
            sum += terms[k].weight *
                   In::load_one(reinterpret_cast<const typename In::Storage*>(atoms + terms[k].offset) + t);
        }
        Out::store_one(out + t, sum);
    }
}

template <class In, class Out>
void compose(const Tile& tile, unsigned char* out, std::int64_t stride, bool stream, Ahead& ahead) {
    for (std::int64_t i = 0; i < tile.rows; ++i) {
        compose_row<In, Out>(tile.atoms, tile.terms + tile.starts[i], tile.starts[i + 1] - tile.starts[i],
                             tile.width, reinterpret_cast<typename Out::Storage*>(out + i * stride), stream,
                             ahead);
    }
    if (stream) stream_fence();
}

template <class Out>
void round_sums(const SumRows& from, unsigned char* out, std::int64_t stride) {
    for (std::int64_t i = 0; i < from.rows; ++i) {
        const float* sums = from.sums + i * from.pitch;
        auto* to = reinterpret_cast<typename Out::Storage*>(out + i * stride);
        std::int64_t t = 0;
        for (; t + 2 * lanes <= from.width; t += 2 * lanes)
            put<Float32, Out>(to + t, Float32::load_pair(sums + t));
        for (; t < from.width; ++t) Out::store_one(to + t, sums[t]);
    }
}

// Products are summed in float32 over runs of 512 entries and in float64 across them.
template <class A, class B>
double dot(const void* first, const void* second, std::int64_t width) {
    const auto* a = static_cast<const typename A::Storage*>(first);
    const auto* b = static_cast<const typename B::Storage*>(second);
    constexpr std::int64_t run = 512;
    double total = 0.0;
    std::int64_t t = 0;
    while (t + 2 * lanes <= width) {
        const std::int64_t stop = t + run < width ? t + run : width;
        Pair sums = {};
        for (; t + 2 * lanes <= stop; t += 2 * lanes) {
            Pair x = A::load_pair(a + t), y = B::load_pair(b + t);
            if constexpr (A::split && !B::split) x = interleave(x);
            if constexpr (B::split && !A::split) y = interleave(y);
            sums.first += x.first * y.first;
            sums.second += x.second * y.second;
        }
        total += sum_of(sums.first + sums.second);
    }
    for (; t < width; ++t) total += static_cast<double>(A::load_one(a + t)) * B::load_one(b + t);
    return total;
}

}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
