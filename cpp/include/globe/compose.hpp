// Sparse mixtures of long vectors, and the derivatives that training them needs.
#pragma once

#include "globe/export.h"
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
// The adjoint, codes^T G, is compose with the transpose of codes and G in the place of the bank.
// Throws std::invalid_argument, naming the argument, where shapes or indices do not fit.
GLOBE_API void compose(const CsrView& codes, const ConstMatrixView& bank, const MatrixView& out,
                       float epsilon = 0.0F, int threads = 0);

// Rows [begin, end) of compose, on the calling thread alone.
GLOBE_API void compose_rows(const CsrView& codes, const ConstMatrixView& bank, const MatrixView& out,
                            std::int64_t begin, std::int64_t end, float epsilon = 0.0F);

// products[k] = <gradient[i, :], bank[j, :]> for every stored entry k = (i, j) of codes, whose values are not
// read: the derivative of a scalar with respect to the codes, where gradient (n x width) is its derivative
// with respect to the mixtures. float32 inside runs of 512 columns, float64 across them; the result does not
// depend on the number of threads. products holds codes.nnz numbers.
GLOBE_API void compose_code_gradient(const CsrView& codes, const ConstMatrixView& gradient,
                                     const ConstMatrixView& bank, double* products, int threads = 0);

}  // namespace globe
