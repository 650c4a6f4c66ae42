// What is compiled once per instruction set: a table of inner loops, filled in by variant.cpp.
//
// Code that is included there must have internal linkage and use no templates of the standard library: the
// linker may keep one copy of a shared inline function, and that copy may hold instructions that another
// machine does not have (numpy/numpy#25274).
#pragma once

#include <cstdint>

#include "globe/view.hpp"

namespace globe::detail {

// One entry of a row of codes: where its atom starts in a packed tile, in bytes, and its weight.
struct Term {
    std::int64_t offset;
    float weight;
};

// Lines of memory that will be read soon, asked for a few at a time: those of rows base + starts[row],
// `bytes` long each. Hardware prefetchers stop at a page's end, so they are of little help here.
struct Ahead {
    const unsigned char* base;
    const std::int64_t* starts;
    std::int64_t rows, bytes;
    std::int64_t step;             // lines to ask for per call
    std::int64_t row = 0, at = 0;  // the next line
};

// A packed tile of the bank, and the rows of codes that are composed from it: row i has terms
// starts[i] .. starts[i + 1].
struct Tile {
    const unsigned char* atoms;
    const Term* terms;
    const std::int64_t* starts;
    std::int64_t rows, width;
};

// out + i * stride (in bytes) = row i: sum of weight * atom[0:width], rounded once. With `stream`, all rows
// of out start at multiples of 64 and are written past the caches.
using Compose = void (*)(const Tile& tile, unsigned char* out, std::int64_t stride, bool stream,
                         Ahead& ahead);

// sum of a[t] * b[t] for t in [0, width).
using Dot = double (*)(const void* a, const void* b, std::int64_t width);

// A symmetric matrix of size x size; what is factored has lift * weights[i] * weights[j] added.
struct NnlsGram {
    const double* data;
    std::int64_t size;
    double lift;
    const double* weights;
};

// What the gradient at an atom must exceed: half * own + by_norm * norms + by_weight * weights.
struct NnlsLeast {
    double half, by_norm, by_weight;
    const double *own, *norms, *weights;
};

// See simd/nnls.hpp.
struct NnlsLoops {
    std::int64_t (*extend)(const NnlsGram& gram, const std::int64_t* atoms, std::int64_t count,
                           std::int64_t kept, double* factor);
    void (*forward)(const double* factor, std::int64_t count, std::int64_t kept, double* y);
    void (*backward)(const double* factor, std::int64_t count, const double* y, double* x);
    void (*gradient)(const NnlsGram& gram, const std::int64_t* atoms, std::int64_t count, const double* x,
                     const double* c, double multiplier, double* w);
    std::int64_t (*exceeding)(const NnlsLeast& least, std::int64_t size, const double* w,
                              std::int64_t* found);
};

// Rows of a panel, from one column on.
struct PanelSource {
    const unsigned char* data;
    std::int64_t stride;  // bytes
    std::int64_t rows;    // at most a panel's; the rest is packed as zeros
    std::int64_t depth;   // columns
    const float* roots;   // factors of the columns, or null
};

// Packs rows into a panel; adds the first rows x cols products of two panels' rows to a matrix.
using Pack = void (*)(const PanelSource& source, std::uint32_t* panel);
using Multiply = void (*)(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, double* gram,
                          std::int64_t stride, std::int64_t rows, std::int64_t cols);

struct GramKernels {
    int panel;     // rows of a panel
    Pack pack[3];  // by dtype, as float32
    Multiply multiply;
    // bfloat16 as it is; null where the machine does not multiply it. Whether an entry is subnormal, which
    // multiply_pairs takes as zero.
    bool (*pack_pairs)(const PanelSource& source, std::uint32_t* panel);
    Multiply multiply_pairs;
};

// Some rows of float or double, for entmax and its derivative; strides are entries from one row to the next.
struct EntmaxTask {
    double alpha, temperature, epsilon;
    std::int64_t rows, cols;
    std::int64_t in_stride, gradient_stride, out_stride;
};

// See simd/entmax.hpp; entries for float and double.
struct EntmaxLoops {
    // The first row that holds NaN or has no finite maximum, or rows; scratch has cols + 64 numbers.
    std::int64_t (*forward[2])(const EntmaxTask& task, const void* logits, void* out, void* scratch);
    void (*backward[2])(const EntmaxTask& task, const void* probabilities, const void* gradient, void* out);
};

// Rounds rows of float32, `pitch` apart, to rows of another dtype, `stride` bytes apart.
struct SumRows {
    const float* sums;
    std::int64_t pitch, rows, width;
};
using RoundSums = void (*)(const SumRows& from, unsigned char* out, std::int64_t stride);

// Words of some rows.
struct WordRows {
    const std::uint32_t* words;
    std::int64_t rows;   // at most a panel's; the rest repeats the first
    std::int64_t count;  // words of a row
};

// How activations become integers: `parts` pairs for a word of weights, to which `offset` has been added.
struct Rounding {
    std::int64_t groups, group;
    int parts, offset;
};

// A panel of weights, group by group, and the tokens that are multiplied with it.
struct QmatmulTask {
    const std::uint32_t* weights;  // groups * steps x panel: words or pairs
    const std::uint32_t* scales;   // groups x panel float32
    const std::uint32_t* ahead;    // words that are asked for meanwhile, as many as are read
    const std::uint32_t* x;        // pairs, `pitch` of them for a token
    const float* x_scales;         // tokens x groups
    const std::int32_t* starts;    // tokens x groups: where a sum begins, for the offset of the weights
    std::int64_t pitch, groups, steps, tokens;
};

// See simd/qmatmul.hpp; by dtype, or for 4 and 8 bits.
struct QmatmulKernels {
    int panel;       // rows of a panel
    int unexpanded;  // tokens up to which words are multiplied as they are
    void (*round[3])(const void* row, const Rounding& rounding, std::uint32_t* pairs, float* scales,
                     std::int32_t* starts);
    void (*widen[3])(const void* scales, std::int64_t stride, std::int64_t rows, std::int64_t count,
                     std::uint32_t* to);
    void (*transpose)(const WordRows& source, std::uint32_t* words);
    void (*expand[2])(const std::uint32_t* words, std::int64_t count, std::uint32_t* pairs);
    void (*multiply[2])(const QmatmulTask& task, float* sums);
    void (*multiply_pairs)(const QmatmulTask& task, float* sums);
};

// A row of a mixture: the sum of weight * entries of the atoms at atoms + offset.
struct MixtureRow {
    const unsigned char* atoms;
    const Term* terms;
    std::int64_t count, width;
};

constexpr std::int64_t few_tokens = 8;  // of a mixture, with which it is multiplied as it is composed

// Some rows and columns of a mixture: float32, or pairs of bfloat16, in words.
struct MixtureTile {
    const std::uint32_t* words;
    std::int64_t rows, pitch, steps;  // pitch: words from row to row
};

// See simd/compose_matmul.hpp.
struct ComposeMatmulKernels {
    // By dtype of the bank, by dtype of x.
    void (*arrange[3][3])(const void* x, std::int64_t width, float* to);
    void (*multiply_row[3])(const MixtureRow& row, const float* x, std::int64_t pitch, std::int64_t tokens,
                            float* out);
    void (*multiply_tile)(const MixtureTile& tile, const std::uint32_t* x, std::int64_t tokens, float* sums);
    // Of bfloat16; null where the machine does not multiply it.
    void (*multiply_pairs)(const MixtureTile& tile, const std::uint32_t* x, std::int64_t tokens, float* sums);
};

struct Variant {
    const char* name;
    Compose compose[3][3];    // by dtype of the bank, by dtype of the output
    Dot dot[3][3];            // by dtype of a, by dtype of b
    RoundSums round_sums[3];  // by dtype of the output
    EntmaxLoops entmax;
    GramKernels gram;
    NnlsLoops nnls;
    QmatmulKernels qmatmul;
    ComposeMatmulKernels compose_matmul;
};

// The table in use.
const Variant& variant();

constexpr int index_of(DType dtype) {
    return static_cast<int>(dtype);
}

// Bytes of an entry.
constexpr std::int64_t entry_of(DType dtype) {
    return static_cast<std::int64_t>(size_of(dtype));
}

}  // namespace globe::detail
