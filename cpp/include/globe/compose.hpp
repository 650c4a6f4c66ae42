// Sparse mixtures of long vectors.
#pragma once

#include "globe/view.hpp"

namespace globe {

// out[i, :] = sum_j codes[i, j] * bank[j, :]
//
// codes    n x m, sparse; entries with |value| < epsilon count as zero
// bank     m x width, any dtype
// out      n x width, any dtype; must not overlap the bank
// threads  0 = one per hardware thread
//
// Sums run in float32, in the order of the stored entries, and are rounded once to the dtype of out (to
// nearest, ties to even). The result does not depend on the number of threads.
// Throws std::invalid_argument, naming the argument, where shapes or indices do not fit.
void compose(const CsrView& codes, const ConstMatrixView& bank, const MatrixView& out, float epsilon = 0.0F,
             int threads = 0);

}  // namespace globe
