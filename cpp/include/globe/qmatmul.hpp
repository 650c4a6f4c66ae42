// Products with weights of few bits.
#pragma once

#include "globe/export.h"
#include "globe/view.hpp"

namespace globe {

// rows x cols weights of 4 or 8 bits, packed as compressed-tensors' "pack-quantized" packs them: each word
// holds 32 / bits consecutive weights of a row, the first in its lowest bits, each with 2^(bits - 1) added.
struct PackedView {
    const std::int32_t* words;  // rows x cols * bits / 32
    std::int64_t rows;
    std::int64_t cols;  // a multiple of 32 / bits
    int bits;
};

// out[t, i] = sum_k x[t, k] * weights[i, k] * scales[i, k / group], with group = weights.cols / scales.cols
//
// x        tokens x cols, any dtype
// scales   rows x groups, any dtype; a group is a multiple of 32 / bits, and 256 at most
// out      tokens x rows, any dtype; must not overlap the others
// threads  0 = one per hardware thread
//
// x is rounded to 16 bits: in every group of a token to multiples of 2^-14 of the power of two below its
// largest entry, so that bfloat16 within 2^7 of that are exact. Sums over a group are exact, those over
// groups run in float32 in their order, and are rounded once to the dtype of out. A token with NaN or an
// infinity gives NaN. A token's result depends neither on the number of threads nor on the other tokens.
// Throws std::invalid_argument, naming the argument, where shapes do not fit.
GLOBE_API void qmatmul(const ConstMatrixView& x, const PackedView& weights, const ConstMatrixView& scales,
                       const MatrixView& out, int threads = 0);

}  // namespace globe
