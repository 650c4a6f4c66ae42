#include "globe/expert.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "activation.hpp"
#include "checkpoint/state.hpp"
#include "codes.hpp"
#include "globe/interrupt.hpp"
#include "globe/parallel.hpp"
#include "mixture.hpp"
#include "variant.hpp"

namespace globe {
namespace {

using detail::entry_of;
using detail::require;
using detail::Term;

constexpr std::int64_t tokens_at_once = 128;
constexpr std::int64_t piece_entries =
    16384;  // of a mixture, composed and multiplied while it is in the caches
constexpr std::int64_t columns_at_once = 128;  // of what is summed over rows
constexpr std::int64_t rows_at_once = 32;      // of a matrix whose rows are multiplied

std::int64_t rows_of_a_piece(std::int64_t width) {
    return std::max<std::int64_t>(1, piece_entries / std::max<std::int64_t>(1, width));
}

// Runs of blocks, each with memory of its own.
std::int64_t most_runs(int threads) {
    return 2 * static_cast<std::int64_t>(resolve_threads(threads));
}

// The largest of anything that a call meets.
struct Sizes {
    std::int64_t tokens, p, d, rank, support, runs;

    Sizes(const FactoredCheckpoint& checkpoint, std::int64_t count, int threads)
        : tokens(std::min(count, tokens_at_once)),
          p(checkpoint.state().p),
          d(checkpoint.hidden_size()),
          rank(checkpoint.state().rank),
          support(checkpoint.state().support),
          runs(most_runs(threads)) {}

    std::int64_t piece() const { return std::max<std::int64_t>({piece_entries, d, rank * columns_at_once}); }
};

// Counts memory off in cache lines.
class Memory {
  public:
    explicit Memory(void* data) : data_(static_cast<unsigned char*>(data)) {
        used_ = (64 - reinterpret_cast<std::uintptr_t>(data) % 64) % 64;
    }

    template <class T>
    T* take(std::int64_t count) {
        auto* start = reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(data_) + used_);
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return start;
    }
    std::size_t used() const { return used_; }

  private:
    unsigned char* data_;
    std::size_t used_;
};

struct Buffers {
    float *x, *projected, *gate, *up, *y;  // of each token d, rank, p, p, d numbers
    Term* terms;                           // of each token max(p, rank)
    std::int64_t* starts;
    Term* codes;  // of one mixture
    float* pieces;

    Buffers(const Sizes& sizes, Memory& memory)
        : x(memory.take<float>(sizes.tokens * sizes.d)),
          projected(memory.take<float>(sizes.tokens * sizes.rank)),
          gate(memory.take<float>(sizes.tokens * sizes.p)),
          up(memory.take<float>(sizes.tokens * sizes.p)),
          y(memory.take<float>(sizes.tokens * sizes.d)),
          terms(memory.take<Term>(sizes.tokens * std::max<std::int64_t>({1, sizes.p, sizes.rank}))),
          starts(memory.take<std::int64_t>(sizes.tokens + 1)),
          codes(memory.take<Term>(sizes.support)),
          pieces(memory.take<float>(sizes.runs * sizes.piece())) {}
};

struct Call {
    const FactoredCheckpoint& checkpoint;
    const ExpertOptions& options;
    const Sizes& sizes;
    const Buffers& memory;
    std::int64_t tokens;  // of this round
};

// block(b, piece) for every block, with memory for a piece of a mixture that no other thread uses.
template <class Block>
void each_block(const Call& call, std::int64_t blocks, const Block& block) {
    const std::int64_t runs = std::min(blocks, call.sizes.runs);
    parallel_for(runs, call.options.threads, [&](std::int64_t run) {
        float* piece = call.memory.pieces + run * call.sizes.piece();
        for (std::int64_t b = run * blocks / runs; b < (run + 1) * blocks / runs; ++b) {
            check_interrupt();
            block(b, piece);
        }
    });
}

std::int64_t blocks_of(std::int64_t count, std::int64_t size) {
    return (count + size - 1) / size;
}

const unsigned char* row_of(const ConstMatrixView& matrix, std::int64_t row) {
    return static_cast<const unsigned char*>(matrix.data) + row * row_bytes(matrix);
}

// A row of sums of weighted rows of memory.
void add_up(DType from, DType to, const detail::Tile& tile, unsigned char* out, std::int64_t stride) {
    detail::Ahead nothing{};
    detail::variant().compose[detail::index_of(from)][detail::index_of(to)](tile, out, stride, false,
                                                                            nothing);
}

// The terms of a mixture; how many there are.
std::int64_t read_codes(const Call& call, const ExpertMatrix& matrix) {
    const Bank& bank = call.checkpoint.banks()[static_cast<std::size_t>(matrix.bank)];
    const std::int64_t first = bank.codes.indptr[matrix.row], last = bank.codes.indptr[matrix.row + 1];
    for (std::int64_t k = first; k < last; ++k) {
        call.memory.codes[k - first] = {bank.codes.indices[k] * row_bytes(bank.atoms), bank.codes.values[k]};
    }
    return last - first;
}

// y[t, i] = <x[t], row i>, y having `stride` numbers of each token.
void multiply(const Call& call, const ConstMatrixView& rows, const float* x, float* y, std::int64_t stride) {
    const auto dot = detail::variant().dot[detail::index_of(DType::float32)][detail::index_of(rows.dtype)];
    for (std::int64_t i = 0; i < rows.rows; ++i) {
        for (std::int64_t t = 0; t < call.tokens; ++t) {
            y[t * stride + i] = static_cast<float>(dot(x + t * rows.cols, row_of(rows, i), rows.cols));
        }
    }
}

// y = x matrix^T, for a matrix in memory.
void multiply_stored(const Call& call, const ConstMatrixView& matrix, const float* x, float* y) {
    each_block(call, blocks_of(matrix.rows, rows_at_once), [&](std::int64_t b, float* /*piece*/) {
        const std::int64_t first = b * rows_at_once, count = std::min(rows_at_once, matrix.rows - first);
        multiply(call, {row_of(matrix, first), count, matrix.cols, matrix.dtype, matrix.stride}, x, y + first,
                 matrix.rows);
    });
}

// y = x mixture^T: some rows of the mixture are composed and multiplied at a time.
void multiply_mixture(const Call& call, const ExpertMatrix& matrix, const float* x, float* y) {
    if (call.options.cache != nullptr) {
        const auto held = call.options.cache->get(call.checkpoint, matrix, call.options.threads);
        return multiply_stored(call, view(*held), x, y);
    }
    const Bank& bank = call.checkpoint.banks()[static_cast<std::size_t>(matrix.bank)];
    const std::int64_t starts[] = {0, read_codes(call, matrix)}, height = rows_of_a_piece(bank.width);
    each_block(call, blocks_of(bank.rank, height), [&](std::int64_t b, float* piece) {
        const std::int64_t first = b * height, count = std::min(height, bank.rank - first);
        const auto* atoms = static_cast<const unsigned char*>(bank.atoms.data) +
                            first * bank.width * entry_of(bank.atoms.dtype);
        add_up(bank.atoms.dtype, DType::float32, {atoms, call.memory.codes, starts, 1, count * bank.width},
               reinterpret_cast<unsigned char*>(piece), 0);
        multiply(call, {piece, count, bank.width, DType::float32}, x, y + first, bank.rank);
    });
}

// Terms by which every token sums up `count` rows, `pitch` bytes apart, with its numbers as weights.
void weigh_rows(const Call& call, const float* weights, std::int64_t count, std::int64_t pitch) {
    for (std::int64_t t = 0; t < call.tokens; ++t) {
        for (std::int64_t i = 0; i < count; ++i) {
            call.memory.terms[t * count + i] = {i * pitch, weights[t * count + i]};
        }
        call.memory.starts[t] = t * count;
    }
    call.memory.starts[call.tokens] = call.tokens * count;
}

// Some columns of y = x rows, rows being where the terms were told.
void sum_columns(const Call& call, DType dtype, const unsigned char* rows, std::int64_t first,
                 const MatrixView& y) {
    const std::int64_t width = std::min(columns_at_once, y.cols - first);
    auto* out = static_cast<unsigned char*>(y.data) + first * entry_of(y.dtype);
    add_up(dtype, y.dtype, {rows, call.memory.terms, call.memory.starts, call.tokens, width}, out,
           row_bytes(y));
}

// y = x matrix, for a matrix in memory.
void combine_stored(const Call& call, const ConstMatrixView& matrix, const float* x, const MatrixView& y) {
    weigh_rows(call, x, matrix.rows, row_bytes(matrix));
    each_block(call, blocks_of(matrix.cols, columns_at_once), [&](std::int64_t b, float* /*piece*/) {
        const std::int64_t first = b * columns_at_once;
        const auto* rows = static_cast<const unsigned char*>(matrix.data) + first * entry_of(matrix.dtype);
        sum_columns(call, matrix.dtype, rows, first, y);
    });
}

// y = x mixture: some columns of the mixture are composed and summed at a time.
void combine_mixture(const Call& call, const ExpertMatrix& matrix, const float* x, const MatrixView& y) {
    if (call.options.cache != nullptr) {
        const auto held = call.options.cache->get(call.checkpoint, matrix, call.options.threads);
        return combine_stored(call, view(*held), x, y);
    }
    const Bank& bank = call.checkpoint.banks()[static_cast<std::size_t>(matrix.bank)];
    const std::int64_t starts[] = {0, read_codes(call, matrix)};
    weigh_rows(call, x, bank.rank, 4 * columns_at_once);
    each_block(call, blocks_of(bank.width, columns_at_once), [&](std::int64_t b, float* piece) {
        const std::int64_t first = b * columns_at_once, width = std::min(columns_at_once, bank.width - first);
        auto* composed = reinterpret_cast<unsigned char*>(piece);
        for (std::int64_t k = 0; k < bank.rank; ++k) {
            const auto* atoms = static_cast<const unsigned char*>(bank.atoms.data) +
                                (k * bank.width + first) * entry_of(bank.atoms.dtype);
            add_up(bank.atoms.dtype, DType::float32, {atoms, call.memory.codes, starts, 1, width},
                   composed + 4 * k * columns_at_once, 0);
        }
        sum_columns(call, DType::float32, composed, first, y);
    });
}

// Rows of numbers in another dtype.
void convert(const Call& call, const ConstMatrixView& from, const MatrixView& to) {
    for (std::int64_t t = 0; t < call.tokens; ++t) {
        const Term one{0, 1.0F};
        const std::int64_t starts[] = {0, 1};
        add_up(from.dtype, to.dtype, {row_of(from, t), &one, starts, 1, from.cols},
               static_cast<unsigned char*>(to.data) + t * row_bytes(to), 0);
    }
}

// y = x W^T for gate or up.
void project(const Call& call, const ExpertMatrix& matrix, const float* x, float* y) {
    if (!matrix.factored()) return multiply_stored(call, matrix.stored, x, y);
    multiply_mixture(call, matrix, x, call.memory.projected);
    multiply_stored(call, matrix.stored, call.memory.projected, y);
}

// y = h W^T for down, of which left factor and mixture are those of the transpose.
void project_back(const Call& call, const ExpertMatrix& matrix, const float* h, const MatrixView& y) {
    if (!matrix.factored()) {
        multiply_stored(call, matrix.stored, h, call.memory.y);
        return convert(call, {call.memory.y, call.tokens, y.cols, DType::float32}, y);
    }
    const std::int64_t rank = matrix.stored.cols;
    combine_stored(call, matrix.stored, h, {call.memory.projected, call.tokens, rank, DType::float32});
    combine_mixture(call, matrix, call.memory.projected, y);
}

void check_matrix(const char* name, const ConstMatrixView& found, std::int64_t rows, std::int64_t cols) {
    const auto shape = [](std::int64_t height, std::int64_t width) {
        return "(" + std::to_string(height) + ", " + std::to_string(width) + ")";
    };
    const bool fits = found.rows == rows && found.cols == cols && found.rows >= 0;
    require(fits, [&] {
        return name + (": found shape " + shape(found.rows, found.cols)) + "; expected " + shape(rows, cols);
    });
    const bool apart = found.stride == 0 || found.stride >= found.cols;
    require(apart, [&] { return std::string(name) + ": found rows that overlap"; });
    const bool there = found.rows == 0 || found.data != nullptr;
    require(there, [&] { return std::string(name) + ": found a null pointer"; });
}

bool overlap(const ConstMatrixView& a, const ConstMatrixView& b) {
    const auto end = [](const ConstMatrixView& m) {
        return row_of(m, m.rows - 1) + m.cols * entry_of(m.dtype);
    };
    return a.rows > 0 && row_of(a, 0) < end(b) && row_of(b, 0) < end(a);
}

}  // namespace

std::size_t expert_workspace(const FactoredCheckpoint& checkpoint, std::int64_t tokens, int threads) {
    require(tokens >= 0, [] { return "tokens: found a negative number"; });
    Memory memory(nullptr);
    const Buffers counted(Sizes(checkpoint, tokens, threads), memory);
    return memory.used() + 64;  // what is needed to start at a cache line
}

void expert_forward(const FactoredCheckpoint& checkpoint, ExpertId expert, const ConstMatrixView& tokens,
                    const MatrixView& out, const Workspace& workspace, const ExpertOptions& options) {
    const auto matrix = [&](Family family) { return checkpoint.matrix(family, expert.layer, expert.expert); };
    const ExpertMatrix gate = matrix(Family::gate), up = matrix(Family::up), down = matrix(Family::down);
    const std::int64_t p = gate.stored.rows, d = checkpoint.hidden_size();
    const ConstMatrixView written{out.data, out.rows, out.cols, out.dtype, out.stride};
    check_matrix("tokens", tokens, std::max<std::int64_t>(0, tokens.rows), d);
    check_matrix("out", written, tokens.rows, d);
    require(!overlap(tokens, written), [] { return "out: found memory that overlaps the tokens"; });
    detail::check_activation(options.activation);
    const std::size_t needed = expert_workspace(checkpoint, tokens.rows, options.threads);
    const bool enough = workspace.data != nullptr && workspace.bytes >= needed;
    require(enough, [&] {
        return "workspace: found " + std::to_string(workspace.bytes) + " bytes; expected " +
               std::to_string(needed);
    });

    const Sizes sizes(checkpoint, tokens.rows, options.threads);
    Memory memory(workspace.data);
    const Buffers buffers(sizes, memory);
    for (std::int64_t first = 0; first < tokens.rows; first += tokens_at_once) {
        const Call call{checkpoint, options, sizes, buffers, std::min(tokens_at_once, tokens.rows - first)};
        convert(call, {row_of(tokens, first), call.tokens, d, tokens.dtype, tokens.stride},
                {buffers.x, call.tokens, d, DType::float32});
        project(call, gate, buffers.x, buffers.gate);
        project(call, up, buffers.x, buffers.up);
        each_block(call, blocks_of(call.tokens * p, rows_at_once), [&](std::int64_t b, float* /*piece*/) {
            const std::int64_t end = std::min((b + 1) * rows_at_once, call.tokens * p);
            for (std::int64_t i = b * rows_at_once; i < end; ++i) {
                buffers.gate[i] = detail::activate(buffers.gate[i], options.activation) * buffers.up[i];
            }
        });
        project_back(call, down, buffers.gate,
                     {static_cast<unsigned char*>(out.data) + first * row_bytes(out), call.tokens, d,
                      out.dtype, out.stride});
    }
}

}  // namespace globe
