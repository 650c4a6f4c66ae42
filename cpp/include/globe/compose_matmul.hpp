// Products with sparse mixtures that are never formed.
#pragma once

#include "globe/export.h"
#include "globe/view.hpp"

namespace globe {

// out[t, :] = (sum_j codes[rows[t], j] * bank[j]) x[t, :], with bank[j] a matrix of out.cols x x.cols
//
// codes    n x m, sparse
// bank     m x (out.cols * x.cols), any dtype; a matrix in each row, row after row
// rows     for each token, the row of codes that is its mixture
// x        tokens x cols, any dtype
// out      tokens x rows of a matrix, any dtype; must not overlap the bank or x
// threads  0 = one per hardware thread
//
// The bank is read once, whichever of its atoms a mixture uses; what is composed is a few numbers in
// registers or, for a mixture of many tokens, a tile in a core's second-level cache. Mixtures are rounded to
// bfloat16 where the tokens of a mixture are many, bank and x are both bfloat16, and the machine has bfloat16
// dot products; else all is float32, rounded once to the dtype of out. The result does not depend on the
// number of threads. Throws std::invalid_argument, naming the argument, where shapes or indices do not fit.
GLOBE_API void compose_matmul(const CsrView& codes, const ConstMatrixView& bank, const std::int64_t* rows,
                              const ConstMatrixView& x, const MatrixView& out, int threads = 0);

}  // namespace globe
