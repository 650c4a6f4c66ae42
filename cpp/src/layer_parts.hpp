// What layer_forward is made of: the experts that are used, rows of their matrices, and products with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "globe/layer.hpp"
#include "globe/parallel.hpp"
#include "variant.hpp"

namespace globe::detail {

inline std::size_t place(std::int64_t i) {
    return static_cast<std::size_t>(i);
}

// A row that is itself, and no sum.
extern const std::vector<Term> itself;

// The rows of a matrix or a mixture: row i is the sum of terms at base + i * pitch.
struct Rows {
    const unsigned char* base;
    std::int64_t pitch, count, width;
    DType dtype;
    const std::vector<Term>* terms;

    bool stored() const { return terms == &itself; }
    std::int64_t size() const { return static_cast<std::int64_t>(terms->size()); }
    std::int64_t bytes_a_row() const { return size() * width * entry_of(dtype); }
};

// The matrices of an expert as they are stored, and its mixture: held, in a dtype, or sums of atoms, whose
// terms lie in memory of the caller.
Rows stored_rows(const FamilyView& family, std::int64_t expert);
Rows mixture_rows(const FamilyView& family, std::int64_t expert, std::int64_t width, DType dtype,
                  std::vector<Term>& terms);

// An expert that is used, its tokens, and their weights.
struct Used {
    std::int64_t expert;
    std::vector<std::int64_t> tokens;
    std::vector<float> weights;

    std::int64_t size() const { return static_cast<std::int64_t>(tokens.size()); }
    // How often its matrices are gone through.
    std::int64_t rounds() const { return (size() + few_tokens - 1) / few_tokens; }
};

// The experts that tokens go to, ascending; of those in [0, experts).
std::vector<Used> used_experts(const Routing& routing, std::int64_t tokens, std::int64_t experts);

// Numbers of each token of an expert.
struct Numbers {
    std::vector<float> values;
    std::int64_t width = 0;

    void resize(std::int64_t tokens, std::int64_t numbers) {
        width = numbers;
        values.resize(place(tokens * numbers));
    }
    float* of(std::int64_t token) { return values.data() + token * width; }
    const float* of(std::int64_t token) const { return values.data() + token * width; }
};

// Some rows or columns that a task does, of the used expert of this number or of all.
struct Block {
    std::size_t number;
    std::int64_t first, count;
};

constexpr std::int64_t columns_a_block = 128;
std::vector<Block> column_blocks(std::int64_t columns, std::size_t number = 0);

// Rows of `bytes` each, of which a task reads some 32 KiB; at least `least`.
void add_row_blocks(std::vector<Block>& blocks, std::size_t number, std::int64_t rows, std::int64_t bytes,
                    std::int64_t least = 1);

// work(block) for every block. Threads that have less than 128 KiB to read are not woken for it.
template <class Work>
void each(const std::vector<Block>& blocks, std::int64_t bytes, int threads, const Work& work) {
    const auto worth = static_cast<int>(std::min<std::int64_t>(threads, 1 + bytes / (128 << 10)));
    parallel_for(static_cast<std::int64_t>(blocks.size()), worth,
                 [&](std::int64_t b) { work(blocks[place(b)]); });
}

// out[0:width] = the sum of weighted rows at `base`, in float32 and rounded once.
void add_up(DType from, const unsigned char* base, const std::vector<Term>& terms, DType to, void* out,
            std::int64_t width);

// Some of the rows, in a dtype: themselves, or composed and rounded in memory of the thread until it asks for
// the next.
Rows in_dtype(const Rows& rows, std::int64_t first, std::int64_t count, DType dtype);

// products[t] = <row i, token first + t> for few tokens, arranged for the rows.
void multiply_row(const Rows& rows, std::int64_t i, const Numbers& x, std::int64_t first, std::int64_t tokens,
                  float* products);

// Products in a dtype, which matrices and mixtures are rounded to, on some threads.
struct Manner {
    DType dtype;
    int threads;
};

// results[e][t, i] = <row i, x[e][t]> for all rows of every used expert.
std::vector<Numbers> multiply(const std::vector<Used>& used, const std::vector<Rows>& rows,
                              const std::vector<Numbers>& x, const Manner& manner);

// The tokens of every used expert, or numbers of theirs, in the order in which multiply_row takes them for
// rows of a dtype.
std::vector<Numbers> arranged_tokens(const std::vector<Used>& used, const ConstMatrixView& tokens,
                                     DType dtype);
std::vector<Numbers> arranged(const std::vector<Used>& used, const std::vector<Numbers>& numbers,
                              DType dtype);

}  // namespace globe::detail
