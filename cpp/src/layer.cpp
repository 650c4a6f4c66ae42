#include "globe/layer.hpp"

#include <stdexcept>
#include <string>

#include "activation.hpp"
#include "codes.hpp"
#include "layer_parts.hpp"

namespace globe {
namespace {

using detail::add_up;
using detail::Block;
using detail::columns_a_block;
using detail::entry_of;
using detail::few_tokens;
using detail::Manner;
using detail::Numbers;
using detail::place;
using detail::require;
using detail::Rows;
using detail::shape_of;
using detail::Term;
using detail::Used;

struct Call {
    const LayerView& layer;
    const ConstMatrixView& tokens;
    const MatrixView& out;
    const std::vector<Used> used;
    const Manner manner;

    std::vector<Rows> stored(const FamilyView& family) const {
        std::vector<Rows> rows;
        for (const Used& expert : used) rows.push_back(detail::stored_rows(family, expert.expert));
        return rows;
    }
    std::vector<Rows> mixtures(const FamilyView& family, std::vector<std::vector<Term>>& terms) const {
        std::vector<Rows> rows;
        terms.resize(used.size());
        for (std::size_t e = 0; e < used.size(); ++e)
            rows.push_back(detail::mixture_rows(family, used[e].expert, tokens.cols, manner.dtype, terms[e]));
        return rows;
    }
};

// What gate or up makes of the tokens.
std::vector<Numbers> project(const Call& call, const FamilyView& family) {
    const DType dtype = call.manner.dtype;
    const std::vector<Numbers> x = detail::arranged_tokens(call.used, call.tokens, dtype);
    if (!family.factored()) return multiply(call.used, call.stored(family), x, call.manner);
    std::vector<std::vector<Term>> terms;
    const std::vector<Numbers> mixed = multiply(call.used, call.mixtures(family, terms), x, call.manner);
    return multiply(call.used, call.stored(family), arranged(call.used, mixed, dtype), call.manner);
}

// act(gate) * up, in the place of gate.
std::vector<Numbers> activated(std::vector<Numbers> gate, const std::vector<Numbers>& up,
                               Activation activation) {
    for (std::size_t e = 0; e < gate.size(); ++e) {
        for (std::size_t i = 0; i < gate[e].values.size(); ++i)
            gate[e].values[i] = detail::activate(gate[e].values[i], activation) * up[e].values[i];
    }
    return gate;
}

// Sums of a block's columns, `pitch` numbers from token to token, rounded to where they belong.
void round_block(const Call& call, const Block& block, const float* sums, std::int64_t pitch) {
    const MatrixView& out = call.out;
    for (std::int64_t t = 0; t < out.rows; ++t) {
        auto* to =
            static_cast<unsigned char*>(out.data) + t * row_bytes(out) + block.first * entry_of(out.dtype);
        add_up(DType::float32, reinterpret_cast<const unsigned char*>(sums + t * pitch), detail::itself,
               out.dtype, to, block.count);
    }
}

// The output of a dense down: some columns of it, which are rows of the matrices, of all experts at a time.
void multiply_back(const Call& call, const std::vector<Numbers>& hidden) {
    const std::vector<Rows> rows = call.stored(call.layer.down);
    std::int64_t bytes = 0, bytes_a_row = 0;
    for (std::size_t e = 0; e < rows.size(); ++e) {
        bytes_a_row += rows[e].bytes_a_row();
        bytes += rows[e].count * rows[e].bytes_a_row() * call.used[e].rounds();
    }
    const std::vector<Numbers> x = arranged(call.used, hidden, call.manner.dtype);
    std::vector<Block> blocks;
    add_row_blocks(blocks, 0, call.out.cols, bytes_a_row, call.tokens.rows > few_tokens ? 8 : 1);
    each(blocks, bytes, call.manner.threads, [&](const Block& block) {
        thread_local std::vector<float> sums;
        sums.assign(place(call.tokens.rows * block.count), 0.0F);
        float products[few_tokens];
        for (std::size_t e = 0; e < call.used.size(); ++e) {
            const Used& used = call.used[e];
            const Rows some = in_dtype(rows[e], block.first, block.count, call.manner.dtype);
            for (std::int64_t first = 0; first < used.size(); first += few_tokens) {
                const std::int64_t tokens = std::min(few_tokens, used.size() - first);
                for (std::int64_t i = 0; i < block.count; ++i) {
                    multiply_row(some, i, x[e], first, tokens, products);
                    for (std::int64_t t = 0; t < tokens; ++t)
                        sums[place(used.tokens[place(first + t)] * block.count + i)] +=
                            used.weights[place(first + t)] * products[t];
                }
            }
        }
        round_block(call, block, sums.data(), block.count);
    });
}

// The sums over rows that a factored down is made of, some columns at a time: h A for every expert's tokens.
std::vector<Numbers> combine_lefts(const Call& call, const std::vector<Numbers>& hidden) {
    const FamilyView& down = call.layer.down;
    std::vector<Numbers> mixed(call.used.size());
    std::vector<Block> blocks;
    std::int64_t bytes = 0;
    for (std::size_t e = 0; e < call.used.size(); ++e) {
        mixed[e].resize(call.used[e].size(), down.matrices.cols);
        for (const Block& block : detail::column_blocks(down.matrices.cols, e)) blocks.push_back(block);
        bytes += down.matrices.rows * row_bytes(down.matrices) * call.used[e].size();
    }
    each(blocks, bytes, call.manner.threads, [&](const Block& block) {
        const std::size_t e = block.number;
        const Rows rows = detail::stored_rows(down, call.used[e].expert);
        thread_local std::vector<Term> terms;
        terms.resize(place(rows.count));
        for (std::int64_t t = 0; t < call.used[e].size(); ++t) {
            for (std::int64_t i = 0; i < rows.count; ++i)
                terms[place(i)] = {i * rows.pitch, hidden[e].of(t)[i]};
            add_up(rows.dtype, rows.base + block.first * entry_of(rows.dtype), terms, DType::float32,
                   mixed[e].of(t) + block.first, block.count);
        }
    });
    return mixed;
}

// sums[t] += some columns of z[t] mixture, weighed, for the tokens of an expert; the mixture's columns are a
// block of their own.
void add_columns(const Rows& columns, const Numbers& mixed, const Used& used, float* sums) {
    thread_local std::vector<Term> terms;
    terms.resize(place(columns.count));
    for (std::int64_t t = 0; t < used.size(); ++t) {
        for (std::int64_t k = 0; k < columns.count; ++k)
            terms[place(k)] = {k * columns.pitch, used.weights[place(t)] * mixed.of(t)[k]};
        float found[columns_a_block];
        add_up(columns.dtype, columns.base, terms, DType::float32, found, columns.width);
        float* sum = sums + used.tokens[place(t)] * columns_a_block;
        for (std::int64_t i = 0; i < columns.width; ++i) sum[i] += found[i];
    }
}

// The output of a factored down.
void combine(const Call& call, const std::vector<Numbers>& hidden) {
    const std::vector<Numbers> mixed = combine_lefts(call, hidden);
    std::vector<std::vector<Term>> terms;
    const std::vector<Rows> mixtures = call.mixtures(call.layer.down, terms);
    std::int64_t bytes = 0;
    for (std::size_t e = 0; e < call.used.size(); ++e)
        bytes += mixtures[e].count * mixtures[e].bytes_a_row() * call.used[e].size();
    each(detail::column_blocks(call.out.cols), bytes, call.manner.threads, [&](const Block& block) {
        thread_local std::vector<float> sums;
        sums.assign(place(call.tokens.rows * columns_a_block), 0.0F);
        for (std::size_t e = 0; e < call.used.size(); ++e) {
            Rows columns = mixtures[e];
            columns.base += block.first * entry_of(columns.dtype);
            columns.width = block.count;
            add_columns(in_dtype(columns, 0, columns.count, call.manner.dtype), mixed[e], call.used[e],
                        sums.data());
        }
        round_block(call, block, sums.data(), columns_a_block);
    });
}

void check_family(const char* name, const FamilyView& family, std::int64_t outputs, std::int64_t inputs,
                  bool turned) {
    const ConstMatrixView& found = family.matrices;
    const std::int64_t rows = family.factored() && turned ? inputs : outputs;
    const std::int64_t cols = family.factored() ? found.cols : inputs;
    require(found.rows == rows && found.cols == cols && (rows * cols == 0 || found.data != nullptr), [&] {
        return name + (": found matrices of shape " + shape_of(found.rows, found.cols)) + "; expected " +
               shape_of(rows, cols);
    });
    if (!family.factored()) return;
    const std::int64_t width = turned ? outputs : inputs;
    require(family.atoms.cols == found.cols * width, [&] {
        return name + (": found atoms of " + std::to_string(family.atoms.cols)) + " entries; expected " +
               shape_of(found.cols, width);
    });
}

}  // namespace

void layer_forward(const LayerView& layer, const Routing& routing, const ConstMatrixView& tokens,
                   const MatrixView& out, int threads) {
    const std::int64_t d = tokens.cols, p = layer.gate.matrices.rows;
    require(tokens.rows >= 0, [&] { return "tokens: found " + std::to_string(tokens.rows) + " rows"; });
    require(out.rows == tokens.rows && out.cols == d, [&] {
        return "out: found shape " + shape_of(out.rows, out.cols) + "; expected " + shape_of(tokens.rows, d);
    });
    require(layer.experts >= 0 && routing.count >= 0, [] { return "routing: found a negative number"; });
    detail::check_activation(layer.activation);
    check_family("gate", layer.gate, p, d, false);
    check_family("up", layer.up, p, d, false);
    check_family("down", layer.down, d, p, true);
    for (std::int64_t k = 0; k < tokens.rows * routing.count; ++k) {
        require(routing.experts[k] >= 0, [&] {
            return "experts: found " + std::to_string(routing.experts[k]) + "; expected 0 or more";
        });
    }
    const Call call{layer,
                    tokens,
                    out,
                    detail::used_experts(routing, tokens.rows, layer.experts),
                    {tokens.dtype, resolve_threads(threads)}};
    const std::vector<Numbers> hidden =
        activated(project(call, layer.gate), project(call, layer.up), layer.activation);
    if (layer.down.factored()) {
        combine(call, hidden);
    } else {
        multiply_back(call, hidden);
    }
}

}  // namespace globe
