// Gram matrices of long vectors, block by block.
#pragma once

#include "globe/export.h"
#include "globe/view.hpp"

namespace globe {

// gram[i, j] += sum_t weights[t] * vectors[i, t] * vectors[j, t]   for j <= i
//
// vectors  n x k, any dtype: one vector per row; a block of longer vectors is a view with a stride
// gram     n x n, row after row; only the lower triangle counts, see gram_mirror
// weights  k numbers of at least 0, or null for ones
// threads  0 = one per hardware thread
//
// Only the lower triangle is computed. Products are summed in float32 over runs of at most 1024 columns and
// in float64 across them. On machines with bfloat16 dot products, bfloat16 vectors without weights are
// multiplied as they are, but for blocks of columns that hold subnormal numbers, which those instructions
// take as zero (as they do sums below 2^-126); all others as float32, times the roots of the weights. The
// result does not depend on the number of threads. Blocks may come in any order and sizes. Throws
// std::invalid_argument, naming the argument, where a shape or a weight does not fit.
GLOBE_API void gram_add(const ConstMatrixView& vectors, double* gram, const float* weights = nullptr,
                        int threads = 0);

// Rows [begin, end) of gram_add, on the calling thread alone.
GLOBE_API void gram_add_rows(const ConstMatrixView& vectors, double* gram, std::int64_t begin,
                             std::int64_t end, const float* weights = nullptr);

// Copies the lower triangle of an n x n matrix to the upper.
GLOBE_API void gram_mirror(double* gram, std::int64_t n);

}  // namespace globe
