#include "globe/layer.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "activation.hpp"
#include "codes.hpp"
#include "globe/parallel.hpp"
#include "variant.hpp"

namespace globe {
namespace {

using detail::index_of;
using detail::shape_of;
using detail::Term;

static_assert(most_layer_tokens <= detail::few_tokens);

constexpr std::int64_t bytes_a_block = 32 << 10;    // that a task reads
constexpr std::int64_t bytes_a_thread = 128 << 10;  // with fewer, waking one takes longer than the work
constexpr std::int64_t columns_a_block = 128;       // of what is summed over rows

// `told` makes the message: nothing is made where all is well.
template <class Message>
void require(bool condition, const Message& told) {
    if (!condition) throw std::invalid_argument(told());
}

std::size_t place(std::int64_t i) {
    return static_cast<std::size_t>(i);
}

std::int64_t entry_of(DType dtype) {
    return static_cast<std::int64_t>(size_of(dtype));
}

// The rows of a matrix or a mixture: row i is the sum of terms at base + i * pitch.
struct Rows {
    const unsigned char* base;
    std::int64_t pitch, count, width;
    DType dtype;
    const std::vector<Term>* terms;

    std::int64_t bytes() const { return static_cast<std::int64_t>(terms->size()) * width * entry_of(dtype); }
};

const std::vector<Term> itself = {{0, 1.0F}};

// An expert that is used, its tokens, and their weights.
struct Used {
    std::int64_t expert;
    std::vector<std::int64_t> tokens;
    std::vector<float> weights;

    std::int64_t size() const { return static_cast<std::int64_t>(tokens.size()); }
};

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

class Layer {
  public:
    Layer(const LayerView& layer, const Routing& routing, const ConstMatrixView& tokens,
          const MatrixView& out, int threads)
        : layer_(layer), tokens_(tokens), out_(out), threads_(resolve_threads(threads)) {
        for (std::int64_t t = 0; t < tokens.rows; ++t) {
            for (std::int64_t k = 0; k < routing.count; ++k) {
                const std::int64_t expert = routing.experts[t * routing.count + k];
                if (expert >= layer.experts) continue;
                const float weight = routing.weights[t * routing.count + k];
                Used& used = of(expert);
                if (!used.tokens.empty() && used.tokens.back() == t) {
                    used.weights.back() += weight;
                    continue;
                }
                used.tokens.push_back(t);
                used.weights.push_back(weight);
            }
        }
        std::sort(used_.begin(), used_.end(),
                  [](const Used& a, const Used& b) { return a.expert < b.expert; });
    }

    void run() {
        const std::size_t count = used_.size();
        gate_.resize(count), up_.resize(count), hidden_.resize(count);
        project(layer_.gate, gate_);
        project(layer_.up, up_);
        activate();
        if (layer_.down.factored()) {
            combine();
        } else {
            multiply_back();
        }
    }

  private:
    // Blocks of what is to be done for every expert.
    struct Block {
        std::size_t number;  // of the used expert
        std::int64_t first, count;
    };

    Used& of(std::int64_t expert) {
        for (Used& used : used_) {
            if (used.expert == expert) return used;
        }
        used_.push_back({expert, {}, {}});
        return used_.back();
    }

    template <class Work>
    void each(const std::vector<Block>& blocks, std::int64_t bytes, const Work& work) const {
        const auto worth = static_cast<int>(std::min<std::int64_t>(threads_, 1 + bytes / bytes_a_thread));
        parallel_for(static_cast<std::int64_t>(blocks.size()), worth,
                     [&](std::int64_t b) { work(blocks[place(b)]); });
    }

    static Rows stored(const FamilyView& family, std::int64_t expert) {
        const ConstMatrixView& first = family.matrices;
        const auto* base =
            static_cast<const unsigned char*>(first.data) + expert * family.step * entry_of(first.dtype);
        return {base, row_bytes(first), first.rows, first.cols, first.dtype, &itself};
    }

    // The mixture of an expert; `terms` are the memory of its own.
    static Rows mixture(const FamilyView& family, std::int64_t expert, std::int64_t width,
                        std::vector<Term>& terms) {
        const std::int64_t rank = family.matrices.cols;
        if (family.mixtures != nullptr && family.mixtures[expert] != nullptr) {
            const auto* base = static_cast<const unsigned char*>(family.mixtures[expert]);
            return {base, width * entry_of(family.mixture_dtype), rank, width, family.mixture_dtype, &itself};
        }
        const std::int64_t row = family.first_row + family.row_step * expert;
        detail::check_codes(family.codes, family.atoms, row, row + 1);
        terms.clear();
        for (std::int64_t k = family.codes.indptr[row]; k < family.codes.indptr[row + 1]; ++k)
            terms.push_back({family.codes.indices[k] * row_bytes(family.atoms), family.codes.values[k]});
        return {static_cast<const unsigned char*>(family.atoms.data),
                width * entry_of(family.atoms.dtype),
                rank,
                width,
                family.atoms.dtype,
                &terms};
    }

    // results[e][t, i] = <row i, x[e][t]> for all rows of every used expert's matrix.
    void multiply(const std::vector<Rows>& rows, const std::vector<Numbers>& x,
                  std::vector<Numbers>& results) const {
        std::vector<Block> blocks;
        std::int64_t bytes = 0;
        for (std::size_t e = 0; e < used_.size(); ++e) {
            results[e].resize(used_[e].size(), rows[e].count);
            add_blocks(blocks, e, rows[e]);
            bytes += rows[e].count * rows[e].bytes();
        }
        each(blocks, bytes, [&](const Block& block) {
            const std::size_t e = block.number;
            float products[detail::few_tokens];
            for (std::int64_t i = block.first; i < block.first + block.count; ++i) {
                multiply_row(rows[e], i, x[e], used_[e].size(), products);
                for (std::int64_t t = 0; t < used_[e].size(); ++t) results[e].of(t)[i] = products[t];
            }
        });
    }

    static void multiply_row(const Rows& rows, std::int64_t i, const Numbers& x, std::int64_t tokens,
                             float* products) {
        detail::variant().compose_matmul.multiply_row[index_of(rows.dtype)](
            {rows.base + i * rows.pitch, rows.terms->data(), static_cast<std::int64_t>(rows.terms->size()),
             rows.width},
            x.values.data(), x.width, tokens, products);
    }

    static void add_blocks(std::vector<Block>& blocks, std::size_t number, const Rows& rows) {
        const std::int64_t height =
            std::max<std::int64_t>(1, bytes_a_block / std::max<std::int64_t>(1, rows.bytes()));
        for (std::int64_t first = 0; first < rows.count; first += height)
            blocks.push_back({number, first, std::min(height, rows.count - first)});
    }

    // The tokens of every used expert, arranged for the dtype of the rows that they are multiplied with.
    std::vector<Numbers> arranged_tokens(const std::vector<Rows>& rows) const {
        std::vector<Numbers> found(used_.size());
        for (std::size_t e = 0; e < used_.size(); ++e) {
            const auto arrange =
                detail::variant().compose_matmul.arrange[index_of(rows[e].dtype)][index_of(tokens_.dtype)];
            found[e].resize(used_[e].size(), tokens_.cols);
            for (std::int64_t t = 0; t < used_[e].size(); ++t) {
                arrange(static_cast<const unsigned char*>(tokens_.data) +
                            used_[e].tokens[place(t)] * row_bytes(tokens_),
                        tokens_.cols, found[e].of(t));
            }
        }
        return found;
    }

    std::vector<Numbers> arranged(const std::vector<Numbers>& numbers, DType dtype) const {
        const auto arrange =
            detail::variant().compose_matmul.arrange[index_of(dtype)][index_of(DType::float32)];
        std::vector<Numbers> found(used_.size());
        for (std::size_t e = 0; e < used_.size(); ++e) {
            found[e].resize(used_[e].size(), numbers[e].width);
            for (std::int64_t t = 0; t < used_[e].size(); ++t)
                arrange(numbers[e].of(t), numbers[e].width, found[e].of(t));
        }
        return found;
    }

    // What gate or up makes of the tokens.
    void project(const FamilyView& family, std::vector<Numbers>& results) const {
        std::vector<Rows> rows;
        for (const Used& used : used_) rows.push_back(stored(family, used.expert));
        if (!family.factored()) return multiply(rows, arranged_tokens(rows), results);
        std::vector<std::vector<Term>> terms(used_.size());
        std::vector<Rows> mixtures;
        for (std::size_t e = 0; e < used_.size(); ++e)
            mixtures.push_back(mixture(family, used_[e].expert, tokens_.cols, terms[e]));
        std::vector<Numbers> mixed(used_.size());
        multiply(mixtures, arranged_tokens(mixtures), mixed);
        multiply(rows, arranged(mixed, family.matrices.dtype), results);
    }

    void activate() {
        for (std::size_t e = 0; e < used_.size(); ++e) {
            const std::size_t count = gate_[e].values.size();
            hidden_[e].resize(used_[e].size(), gate_[e].width);
            for (std::size_t i = 0; i < count; ++i)
                hidden_[e].values[i] =
                    detail::activate(gate_[e].values[i], layer_.activation) * up_[e].values[i];
        }
    }

    // out for a dense down: rows of it of all experts together.
    void multiply_back() const {
        std::vector<Rows> rows;
        std::int64_t bytes = 0;
        for (const Used& used : used_) {
            rows.push_back(stored(layer_.down, used.expert));
            bytes += rows.back().count * rows.back().bytes();
        }
        const std::vector<Numbers> hidden = arranged(hidden_, layer_.down.matrices.dtype);
        std::vector<Block> blocks;
        const std::int64_t each_row = std::max<std::int64_t>(1, bytes / std::max<std::int64_t>(1, out_.cols));
        const std::int64_t height = std::max<std::int64_t>(1, bytes_a_block / each_row);
        for (std::int64_t first = 0; first < out_.cols; first += height)
            blocks.push_back({0, first, std::min(height, out_.cols - first)});
        each(blocks, bytes, [&](const Block& block) {
            thread_local std::vector<float> sums;
            sums.assign(place(tokens_.rows * block.count), 0.0F);
            float products[detail::few_tokens];
            for (std::size_t e = 0; e < used_.size(); ++e) {
                for (std::int64_t i = 0; i < block.count; ++i) {
                    multiply_row(rows[e], block.first + i, hidden[e], used_[e].size(), products);
                    for (std::int64_t t = 0; t < used_[e].size(); ++t)
                        sums[place(used_[e].tokens[place(t)] * block.count + i)] +=
                            used_[e].weights[place(t)] * products[t];
                }
            }
            const Term one{0, 1.0F};
            for (std::int64_t t = 0; t < tokens_.rows; ++t)
                sum_columns(DType::float32,
                            reinterpret_cast<const unsigned char*>(sums.data() + t * block.count), {&one, 1},
                            t, block.first, block.count);
        });
    }

    struct Terms {
        const Term* data;
        std::int64_t count;
    };

    // Some columns of a row of out: the sum of terms at base.
    void sum_columns(DType dtype, const unsigned char* base, Terms terms, std::int64_t token,
                     std::int64_t first, std::int64_t width) const {
        add_up(
            dtype, base, terms, out_.dtype,
            static_cast<unsigned char*>(out_.data) + token * row_bytes(out_) + first * entry_of(out_.dtype),
            width);
    }

    static void add_up(DType from, const unsigned char* base, Terms terms, DType to, void* out,
                       std::int64_t width) {
        const std::int64_t starts[] = {0, terms.count};
        detail::Ahead nothing{};
        detail::variant().compose[index_of(from)][index_of(to)](
            {base, terms.data, starts, 1, width}, static_cast<unsigned char*>(out), 0, false, nothing);
    }

    // out for a factored down: (h A) mixture, sums of weighted rows.
    void combine() const {
        const FamilyView& down = layer_.down;
        const std::int64_t rank = down.matrices.cols;
        std::vector<Numbers> mixed(used_.size());
        std::vector<Block> blocks;
        std::int64_t bytes = 0;
        for (std::size_t e = 0; e < used_.size(); ++e) {
            mixed[e].resize(used_[e].size(), rank);
            bytes += down.matrices.rows * rank * entry_of(down.matrices.dtype);
            for (const Block& block : column_blocks(rank, e)) blocks.push_back(block);
        }
        each(blocks, bytes, [&](const Block& block) {
            const Rows rows = stored(down, used_[block.number].expert);
            thread_local std::vector<Term> terms;
            for (std::int64_t t = 0; t < used_[block.number].size(); ++t) {
                const float* hidden = hidden_[block.number].of(t);
                terms.clear();
                for (std::int64_t i = 0; i < rows.count; ++i) terms.push_back({i * rows.pitch, hidden[i]});
                add_up(rows.dtype, rows.base + block.first * entry_of(rows.dtype), {terms.data(), rows.count},
                       DType::float32, mixed[block.number].of(t) + block.first, block.count);
            }
        });
        combine_mixtures(mixed);
    }

    // Weighted rows that lie in memory of one dtype.
    struct Sum {
        const unsigned char* base = nullptr;
        DType dtype = DType::float32;
        std::vector<Term> terms;

        void add(const Rows& rows, const float* weights, float scale) {
            if (base == nullptr) base = rows.base, dtype = rows.dtype;
            for (std::int64_t k = 0; k < rows.count; ++k) {
                for (const Term& term : *rows.terms)
                    terms.push_back({(rows.base - base) + k * rows.pitch + term.offset,
                                     scale * weights[k] * term.weight});
            }
        }
        void columns(std::int64_t first, std::int64_t width, DType to, void* out) const {
            const unsigned char* from = base == nullptr ? nullptr : base + first * entry_of(dtype);
            add_up(dtype, from, {terms.data(), static_cast<std::int64_t>(terms.size())}, to, out, width);
        }
    };

    void combine_mixtures(const std::vector<Numbers>& mixed) const {
        // Of each token: rows of mixtures that are held, and of atoms.
        std::vector<std::array<Sum, 2>> sums(place(tokens_.rows));
        std::vector<std::vector<Term>> own(used_.size());
        std::int64_t bytes = 0;
        for (std::size_t e = 0; e < used_.size(); ++e) {
            const Rows rows = mixture(layer_.down, used_[e].expert, out_.cols, own[e]);
            bytes += rows.count * rows.bytes();
            for (std::int64_t t = 0; t < used_[e].size(); ++t) {
                sums[place(used_[e].tokens[place(t)])][rows.terms == &itself ? 0 : 1].add(
                    rows, mixed[e].of(t), used_[e].weights[place(t)]);
            }
        }
        each(column_blocks(out_.cols, 0), bytes, [&](const Block& block) {
            float both[2][columns_a_block];
            const Term terms[] = {{0, 1.0F}, {static_cast<std::int64_t>(sizeof both[0]), 1.0F}};
            for (std::int64_t t = 0; t < tokens_.rows; ++t) {
                for (std::size_t i = 0; i < 2; ++i)
                    sums[place(t)][i].columns(block.first, block.count, DType::float32, both[i]);
                sum_columns(DType::float32, reinterpret_cast<const unsigned char*>(both), {terms, 2}, t,
                            block.first, block.count);
            }
        });
    }

    static std::vector<Block> column_blocks(std::int64_t columns, std::size_t number) {
        std::vector<Block> blocks;
        for (std::int64_t first = 0; first < columns; first += columns_a_block)
            blocks.push_back({number, first, std::min(columns_a_block, columns - first)});
        return blocks;
    }

    const LayerView layer_;
    const ConstMatrixView tokens_;
    const MatrixView out_;
    const int threads_;
    std::vector<Used> used_;
    std::vector<Numbers> gate_, up_, hidden_;
};

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
    require(0 <= tokens.rows && tokens.rows <= most_layer_tokens,
            [&] { return "tokens: found " + std::to_string(tokens.rows) + "; expected 8 at most"; });
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
    Layer(layer, routing, tokens, out, threads).run();
}

}  // namespace globe
