// Inner loops of entmax: a range of rows. Included by variant.cpp alone.
#pragma once

#include "../variant.hpp"
#include "entmax_laws.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {
namespace entmax {

constexpr int groups = 4;  // vectors of running maxima

// Calls visit(vector, position, count) along a row; the lanes of the last vector from count on hold `fill`.
template <class T, class Visit>
GLOBE_INLINE void along(const T* row, std::int64_t cols, T fill, const Visit& visit) {
    constexpr int count = Lanes<T>::count;
    std::int64_t i = 0;
    for (; i + count <= cols; i += count) visit(load<VectorOf<T>>(row + i), i, std::int64_t(count));
    if (i < cols) visit(load_some(row + i, cols - i, fill), i, cols - i);
}

template <class T>
GLOBE_INLINE VectorOf<T> load_up_to(const T* from, std::int64_t count, T fill) {
    return count == Lanes<T>::count ? load<VectorOf<T>>(from) : load_some(from, count, fill);
}

template <class T>
GLOBE_INLINE void put_up_to(T* to, const VectorOf<T>& x, std::int64_t count) {
    if (count == Lanes<T>::count) {
        store(to, x);
    } else {
        store_some(to, x, count);
    }
}

// The largest of every residue of columns modulo groups * count, less the largest of all; false if
// that is not finite or the row holds NaN.
template <class T>
GLOBE_INLINE bool find_maxima(const T* row, std::int64_t cols, T* maxima, T& top) {
    using Vector = VectorOf<T>;
    constexpr int count = Lanes<T>::count, wide = groups * count;
    constexpr T infinity = T(__builtin_inf());
    Vector largest[groups];
    decltype(largest[0] != largest[0]) strange[groups] = {};
    for (auto& group : largest) group = broadcast(-infinity);
    const auto look = [&](int group, const Vector& x) {
        largest[group] = larger(x, largest[group]);
        strange[group] |= x != x;
    };
    std::int64_t i = 0;
    for (; i + wide <= cols; i += wide) {
        for (int group = 0; group < groups; ++group) {
            __builtin_prefetch(row + i + group * count + 2 * cols);  // prefetchers stop at a page's end
            look(group, load<Vector>(row + i + group * count));
        }
    }
    for (int group = 0; i < cols; ++group, i += count) {
        look(group, i + count <= cols ? load<Vector>(row + i) : load_some(row + i, cols - i, -infinity));
    }
    const auto any = (strange[0] | strange[1]) | (strange[2] | strange[3]);
    for (int lane = 0; lane < count; ++lane) {
        if (any[lane] != 0) return false;
    }
    top = largest_of<T>(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
    if (!(top > -infinity && top < infinity)) return false;
    for (int group = 0; group < groups; ++group) store(maxima + group * count, largest[group] - top);
    return true;
}

template <class T>
struct Threshold {
    T tau, sum;  // of the shares
};

// Climbs from tau to where the shares of `size` logits, a multiple of two vectors, sum to at most 1 + slack.
template <class Law, class T>
GLOBE_INLINE Threshold<T> climb(const Law& law, const T* logits, std::int64_t size, T tau, T slack) {
    constexpr int count = Lanes<T>::count;
    constexpr int most_steps = 100;      // six are many
    constexpr int run = 32 * 2 * count;  // sums of sums lose less
    T sum = T(1);
    for (int steps = 0; steps < most_steps; ++steps) {
        const auto at = broadcast(tau);
        Terms<T> all = {};
        for (std::int64_t begin = 0; begin < size; begin += run) {
            const std::int64_t end = begin + run < size ? begin + run : size;
            Terms<T> even = {}, odd = {};
            for (std::int64_t i = begin; i < end; i += 2 * count) {
                const Terms<T> a = law.terms(load<VectorOf<T>>(logits + i), at);
                const Terms<T> b = law.terms(load<VectorOf<T>>(logits + i + count), at);
                even.share += a.share;
                even.slope += a.slope;
                odd.share += b.share;
                odd.slope += b.slope;
            }
            all.share += even.share + odd.share;
            all.slope += even.slope + odd.slope;
        }
        sum = total_of<T>(all.share);
        if (sum <= T(1) + slack) break;
        const T next = tau + law.step(sum, total_of<T>(all.slope));
        if (!(next > tau)) break;
        tau = next;
    }
    return {tau, sum};
}

// The logits that may have a share at a threshold not below tau, less top; padded to whole pairs of vectors.
template <class Law, class T>
GLOBE_INLINE std::int64_t find_candidates(const Law& law, const T* row, std::int64_t cols, T top, T tau,
                                          T* candidates) {
    using Vector = VectorOf<T>;
    constexpr int count = Lanes<T>::count;
    constexpr T infinity = T(__builtin_inf());
    std::int64_t found = 0;
    const Vector at = broadcast(tau);
    along(row, cols, -infinity, [&](const Vector& x, std::int64_t, std::int64_t) {
        const Vector y = x - top;
        const std::uint32_t mask = positive<T>(law.above(y, at));
        if (mask != 0) found += compress(candidates + found, y, mask);
    });
    store(candidates + found, broadcast(-infinity));
    store(candidates + found + count, broadcast(-infinity));
    return (found + 2 * count - 1) / (2 * count) * (2 * count);
}

// Sets probabilities below epsilon to 0, but not the largest, and scales the rest to sum to 1.
template <class T>
void prune(T* row, std::int64_t cols, T epsilon) {
    using Vector = VectorOf<T>;
    Vector largest = {}, kept = {};
    along(row, cols, T(0),
          [&](const Vector& p, std::int64_t, std::int64_t) { largest = larger(p, largest); });
    const T most = largest_of<T>(largest);
    const Vector cut = broadcast(epsilon < most ? epsilon : most), zero = {};
    along(row, cols, T(0), [&](const Vector& p, std::int64_t, std::int64_t) { kept += p >= cut ? p : zero; });
    const T factor = T(1) / total_of<T>(kept);
    along(row, cols, T(0), [&](const Vector& p, std::int64_t i, std::int64_t count) {
        put_up_to(row + i, p >= cut ? p * factor : zero, count);
    });
}

template <class Law, class T>
GLOBE_INLINE bool forward_row(const Law& law, const T* row, std::int64_t cols, T epsilon, T* scratch,
                              T* out) {
    constexpr int wide = groups * Lanes<T>::count;
    constexpr T slack = T(4) * Lanes<T>::epsilon;
    T top;
    if (!find_maxima(row, cols, scratch, top)) return false;

    // The threshold of some of the logits is a lower bound on that of all, and the largest of the residues
    // are most of those that matter: few candidates are left above it.
    Threshold<T> found = climb(law, scratch, wide, Law::start, cols <= wide ? slack : T(0.25));
    if (cols > wide) {
        const std::int64_t size = find_candidates(law, row, cols, top, found.tau, scratch);
        found = climb(law, scratch, size, found.tau, slack);
    }

    const VectorOf<T> tau = broadcast(found.tau);
    const T factor = T(1) / found.sum;
    along(row, cols, T(-__builtin_inf()), [&](const auto& x, std::int64_t i, std::int64_t count) {
        put_up_to(out + i, law.share(x - top, tau) * factor, count);
    });
    if (epsilon > T(0)) prune(out, cols, epsilon);
    return true;
}

template <class Law>
std::int64_t forward_range(const EntmaxTask& task, const void* in, void* out, void* scratch) {
    using T = typename Law::Number;
    const Law law(task);
    const auto epsilon = static_cast<T>(task.epsilon);
    const auto* row = static_cast<const T*>(in);
    auto* target = static_cast<T*>(out);
    for (std::int64_t i = 0; i < task.rows; ++i, row += task.in_stride, target += task.out_stride) {
        if (!forward_row(law, row, task.cols, epsilon, static_cast<T*>(scratch), target)) return i;
    }
    return task.rows;
}

template <class T>
std::int64_t forward(const EntmaxTask& task, const void* in, void* out, void* scratch) {
    if (task.alpha == 2.0) return forward_range<Sparsemax<T>>(task, in, out, scratch);
    if (task.alpha == 1.5) return forward_range<Entmax15<T>>(task, in, out, scratch);
    return forward_range<GeneralEntmax<T>>(task, in, out, scratch);
}

}  // namespace entmax
}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
