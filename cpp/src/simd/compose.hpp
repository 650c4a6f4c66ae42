// Inner loops of compose: one row of one tile. Included by variant.cpp alone.
#pragma once

#include "../variant.hpp"
#include "vector.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {

template <class In, class Out>
GLOBE_INLINE void put(typename Out::Storage* to, const Pair& sums) {
    if constexpr (In::split == Out::split) {
        Out::store_pair(to, sums);
    } else if constexpr (In::split) {
        Out::store_pair(to, interleave(sums));
    } else {
        typename Out::Storage both[2 * lanes];
        for (int i = 0; i < lanes; ++i) {
            Out::store_one(both + i, sums.first[i]);
            Out::store_one(both + lanes + i, sums.second[i]);
        }
        __builtin_memcpy(to, both, sizeof both);
    }
}

// Keeps `pairs` pairs of sums in registers while all terms are added.
template <class In, class Out, int pairs>
GLOBE_INLINE void compose_block(const Term* terms, std::int64_t count, std::int64_t column,
                                typename Out::Storage* out) {
    Pair sums[pairs] = {};
    for (std::int64_t k = 0; k < count; ++k) {
        const auto* atom = reinterpret_cast<const typename In::Storage*>(terms[k].atom) + column;
        const F32 weight = splat(terms[k].weight);
        for (int v = 0; v < pairs; ++v) {
            const Pair x = In::load_pair(atom + v * 2 * lanes);
            sums[v].first += weight * x.first;
            sums[v].second += weight * x.second;
        }
    }
    for (int v = 0; v < pairs; ++v) put<In, Out>(out + v * 2 * lanes, sums[v]);
}

template <class In, class Out>
void compose_row(const Term* terms, std::int64_t count, std::int64_t begin, std::int64_t width,
                 void* target) {
    auto* out = static_cast<typename Out::Storage*>(target);
    constexpr int wide = 8 * lanes, narrow = 2 * lanes;
    std::int64_t t = 0;
    for (; t + wide <= width; t += wide) compose_block<In, Out, 4>(terms, count, begin + t, out + t);
    for (; t + narrow <= width; t += narrow) compose_block<In, Out, 1>(terms, count, begin + t, out + t);
    for (; t < width; ++t) {
        float sum = 0.0F;
        for (std::int64_t k = 0; k < count; ++k) {
            sum += terms[k].weight *
                   In::load_one(reinterpret_cast<const typename In::Storage*>(terms[k].atom) + begin + t);
        }
        Out::store_one(out + t, sum);
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
