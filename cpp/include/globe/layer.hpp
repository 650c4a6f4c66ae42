// What the routed experts of a layer make of their tokens, in one call.
#pragma once

#include <cstdint>

#include "globe/expert.hpp"
#include "globe/export.h"
#include "globe/view.hpp"

namespace globe {

// The matrices of one family (gate, up or down) of all experts of a layer, in memory. Those of gate and up
// are p x d, those of down d x p. In a factored family `matrices` are the left factors, p x r, and a matrix
// is left factor * mixture, of down the transpose; mixtures are r x d.
struct FamilyView {
    ConstMatrixView matrices;           // of expert 0
    std::int64_t step;                  // entries from one expert's matrix to the next's
    const void* const* each = nullptr;  // where the matrices of all experts are, in place of step

    // A dense family has none of these. `mixtures` are those of the experts in the dtype of the tokens; one
    // that is null, and all of them where this is, are composed as they are multiplied, and rounded to that
    // dtype: sum_j codes[row, j] * atoms[j], with the row of expert e being first_row + row_step * e, and
    // atoms m x (r * d).
    ConstMatrixView atoms{};
    CsrView codes{};
    std::int64_t first_row = 0, row_step = 1;
    const void* const* mixtures = nullptr;

    bool factored() const { return atoms.data != nullptr; }
};

struct LayerView {
    FamilyView gate, up, down;
    std::int64_t experts;
    Activation activation = Activation::silu;
};

// The experts that each token goes to, and the weights of what they make of it: tokens x count of both. An
// expert number that is layer.experts or more stands for none.
struct Routing {
    const std::int64_t* experts;
    const float* weights;
    std::int64_t count;
};

// out[t] = sum_k weights[t, k] * down(act(gate x_t) * (up x_t)) of expert experts[t, k]
//
// tokens     n x d, any dtype
// out        n x d, any dtype; must not overlap the tokens
// threads    0 = one per hardware thread; a call with little to do takes fewer
//
// Matrices and mixtures are taken in the dtype of the tokens; all else is float32 between the tokens and the
// output. Products run at the rate of fused multiply-adds: this is made for decoding, and for prompts of
// small experts. What comes out for a token depends neither on the other tokens, on the number of threads,
// nor on which mixtures are held. Throws std::invalid_argument, naming the argument, where shapes do not fit.
GLOBE_API void layer_forward(const LayerView& layer, const Routing& routing, const ConstMatrixView& tokens,
                             const MatrixView& out, int threads = 0);

}  // namespace globe
