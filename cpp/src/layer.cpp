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
using detail::Numbers;
using detail::place;
using detail::Rows;
using detail::shape_of;
using detail::Term;
using detail::Used;

// `told` makes the message: nothing is made where all is well.
template <class Message>
void require(bool condition, const Message& told) {
    if (!condition) throw std::invalid_argument(told());
}

struct Call {
    const LayerView& layer;
    const ConstMatrixView& tokens;
    const MatrixView& out;
    const std::vector<Used> used;
    const int threads;
};

// What gate or up makes of the tokens.
std::vector<Numbers> project(const Call& call, const FamilyView& family) {
    std::vector<Rows> rows;
    for (const Used& used : call.used) rows.push_back(detail::stored_rows(family, used.expert));
    std::vector<Numbers> results(call.used.size());
    if (!family.factored()) {
        multiply(call.used, rows, arranged_tokens(call.used, rows, call.tokens), results, call.threads);
        return results;
    }
    std::vector<std::vector<Term>> terms(call.used.size());
    std::vector<Rows> mixtures;
    for (std::size_t e = 0; e < call.used.size(); ++e)
        mixtures.push_back(detail::mixture_rows(family, call.used[e].expert, call.tokens.cols, terms[e]));
    std::vector<Numbers> mixed(call.used.size());
    multiply(call.used, mixtures, arranged_tokens(call.used, mixtures, call.tokens), mixed, call.threads);
    multiply(call.used, rows, arranged(call.used, mixed, family.matrices.dtype), results, call.threads);
    return results;
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
    std::vector<Rows> rows;
    std::int64_t bytes = 0, bytes_a_row = 0;
    for (const Used& used : call.used) {
        rows.push_back(detail::stored_rows(call.layer.down, used.expert));
        bytes_a_row += rows.back().bytes_a_row();
        bytes += rows.back().count * rows.back().bytes_a_row() * used.rounds();
    }
    const std::vector<Numbers> x = arranged(call.used, hidden, call.layer.down.matrices.dtype);
    std::vector<Block> blocks;
    add_row_blocks(blocks, 0, call.out.cols, bytes_a_row, call.tokens.rows > few_tokens ? 8 : 1);
    each(blocks, bytes, call.threads, [&](const Block& block) {
        thread_local std::vector<float> sums;
        sums.assign(place(call.tokens.rows * block.count), 0.0F);
        float products[few_tokens];
        for (std::size_t e = 0; e < call.used.size(); ++e) {
            const Used& used = call.used[e];
            for (std::int64_t first = 0; first < used.size(); first += few_tokens) {
                const std::int64_t tokens = std::min(few_tokens, used.size() - first);
                for (std::int64_t i = 0; i < block.count; ++i) {
                    multiply_row(rows[e], block.first + i, x[e], first, tokens, products);
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
    each(blocks, bytes, call.threads, [&](const Block& block) {
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

// sums[t] += some columns of z[t] mixture, weighed, for the tokens of an expert.
void add_columns(const Rows& rows, const Numbers& mixed, const Used& used, const Block& block, float* sums) {
    thread_local std::vector<float> composed;
    thread_local std::vector<Term> terms;
    Rows some{rows.base + block.first * entry_of(rows.dtype),
              rows.pitch,
              rows.count,
              block.count,
              rows.dtype,
              &detail::itself};
    if (!rows.stored()) {
        composed.resize(place(rows.count * columns_a_block));
        for (std::int64_t k = 0; k < rows.count; ++k)
            add_up(rows.dtype, some.base + k * rows.pitch, *rows.terms, DType::float32,
                   composed.data() + k * columns_a_block, block.count);
        some.base = reinterpret_cast<const unsigned char*>(composed.data());
        some.pitch = columns_a_block * entry_of(DType::float32);
        some.dtype = DType::float32;
    }
    terms.resize(place(rows.count));
    for (std::int64_t t = 0; t < used.size(); ++t) {
        for (std::int64_t k = 0; k < rows.count; ++k)
            terms[place(k)] = {k * some.pitch, used.weights[place(t)] * mixed.of(t)[k]};
        float columns[columns_a_block];
        add_up(some.dtype, some.base, terms, DType::float32, columns, block.count);
        float* sum = sums + used.tokens[place(t)] * columns_a_block;
        for (std::int64_t i = 0; i < block.count; ++i) sum[i] += columns[i];
    }
}

// The output of a factored down.
void combine(const Call& call, const std::vector<Numbers>& hidden) {
    const std::vector<Numbers> mixed = combine_lefts(call, hidden);
    std::vector<std::vector<Term>> terms(call.used.size());
    std::vector<Rows> mixtures;
    std::int64_t bytes = 0;
    for (std::size_t e = 0; e < call.used.size(); ++e) {
        mixtures.push_back(
            detail::mixture_rows(call.layer.down, call.used[e].expert, call.out.cols, terms[e]));
        bytes += mixtures[e].count * mixtures[e].bytes_a_row() * call.used[e].size();
    }
    each(detail::column_blocks(call.out.cols), bytes, call.threads, [&](const Block& block) {
        thread_local std::vector<float> sums;
        sums.assign(place(call.tokens.rows * columns_a_block), 0.0F);
        for (std::size_t e = 0; e < call.used.size(); ++e)
            add_columns(mixtures[e], mixed[e], call.used[e], block, sums.data());
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
    check_family("gate", layer.gate, p, d, false);
    check_family("up", layer.up, p, d, false);
    check_family("down", layer.down, d, p, true);
    for (std::int64_t k = 0; k < tokens.rows * routing.count; ++k) {
        require(routing.experts[k] >= 0, [&] {
            return "experts: found " + std::to_string(routing.experts[k]) + "; expected 0 or more";
        });
    }
    const Call call{layer, tokens, out, detail::used_experts(routing, tokens.rows, layer.experts),
                    resolve_threads(threads)};
    const std::vector<Numbers> hidden =
        activated(project(call, layer.gate), project(call, layer.up), layer.activation);
    if (layer.down.factored()) {
        combine(call, hidden);
    } else {
        multiply_back(call, hidden);
    }
}

}  // namespace globe
