// Sparse probabilities, and the derivative that training through them needs.
#pragma once

#include "globe/export.h"
#include "globe/view.hpp"

namespace globe {

struct EntmaxOptions {
    double alpha = 1.5;        // in (1, 2]; 2 is sparsemax
    double temperature = 1.0;  // T > 0
    double epsilon = 0.0;      // in [0, 1)
};

// Row by row, p = argmax <p, z / T> + H_alpha(p) over the probability simplex, with Tsallis' entropy H_alpha:
//
//     p = max((alpha - 1) z / T - tau, 0)^(1 / (alpha - 1)),    tau such that p sums to 1.
//
// Then probabilities below epsilon become 0 and the others are scaled to sum to 1; the largest always stays.
//
// logits         n x d, z; -infinity gives probability 0
// probabilities  n x d, p; must not overlap the logits
// T              float or double, in which everything is computed
// threads        0 = one per hardware thread
//
// The result does not depend on the number of threads.
// Throws std::invalid_argument, naming the argument, where shapes do not fit, an option is out of range, or a
// row of logits holds NaN or +infinity or nothing but -infinity.
//
// Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019; Martins and Astudillo, "From
// softmax to sparsemax", ICML 2016.
template <class T>
GLOBE_API void entmax(const RowsView<const T>& logits, const RowsView<T>& probabilities,
                      const EntmaxOptions& options = {}, int threads = 0);

// Rows [begin, end) of entmax, on the calling thread alone.
template <class T>
GLOBE_API void entmax_rows(const RowsView<const T>& logits, const RowsView<T>& probabilities,
                           std::int64_t begin, std::int64_t end, const EntmaxOptions& options = {});

// Row by row, the derivative dz of a scalar with respect to the logits, from the probabilities p = entmax(z)
// (with epsilon = 0, which is not read here) and the derivative dp with respect to them:
//
//     dz = s (dp - <s, dp> / sum s) / T,    s = p^(2 - alpha) where p > 0 and 0 elsewhere.
//
// probabilities  n x d
// gradient       n x d, dp; not read where p = 0
// out            n x d, dz; must not overlap the others
template <class T>
GLOBE_API void entmax_backward(const RowsView<const T>& probabilities, const RowsView<const T>& gradient,
                               const RowsView<T>& out, const EntmaxOptions& options = {}, int threads = 0);

// Rows [begin, end) of entmax_backward, on the calling thread alone.
template <class T>
GLOBE_API void entmax_backward_rows(const RowsView<const T>& probabilities, const RowsView<const T>& gradient,
                                    const RowsView<T>& out, std::int64_t begin, std::int64_t end,
                                    const EntmaxOptions& options = {});

}  // namespace globe
