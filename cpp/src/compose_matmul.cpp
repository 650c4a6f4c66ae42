#include "globe/compose_matmul.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "codes.hpp"
#include "globe/interrupt.hpp"
#include "globe/parallel.hpp"
#include "variant.hpp"

namespace globe {
namespace {

using detail::index_of;
using detail::require;
using detail::shape_of;
using detail::Term;

// Rows of the mixtures that a task does, and columns of a tile: 48 KiB of float32.
constexpr std::int64_t task_rows = 24, tile_cols = 512;

void validate(const CsrView& codes, const ConstMatrixView& bank, const std::int64_t* rows,
              const ConstMatrixView& x, const MatrixView& out) {
    detail::check_codes(codes, bank, 0, codes.rows);
    require(out.rows == x.rows, "out: found " + std::to_string(out.rows) + " rows; expected " +
                                    std::to_string(x.rows) + ", one per token");
    require(bank.cols == out.cols * x.cols, "bank: found " + std::to_string(bank.cols) +
                                                " entries of an atom; expected " + std::to_string(out.cols) +
                                                " x " + std::to_string(x.cols));
    require(x.rows == 0 || rows != nullptr,
            "rows: found a null pointer; expected a row of codes for each token");
    for (std::int64_t t = 0; t < x.rows; ++t) {
        require(
            0 <= rows[t] && rows[t] < codes.rows,
            "rows: found " + std::to_string(rows[t]) + "; expected 0 to " + std::to_string(codes.rows - 1));
    }
}

// Tokens [begin, end) of the sorted ones, which have one mixture.
struct Segment {
    std::int64_t begin, end;
    std::vector<Term> terms;
    std::vector<std::int64_t> places;  // where its atoms are, for prefetching

    std::int64_t tokens() const { return end - begin; }
    bool few() const { return tokens() <= detail::few_tokens; }
};

// A product: tokens sorted by mixture, and packed as the loops take them.
class Product {
  public:
    Product(const CsrView& codes, const ConstMatrixView& bank, const std::int64_t* rows,
            const ConstMatrixView& x, const MatrixView& out)
        : bank_(bank), x_(x), out_(out), order_(static_cast<std::size_t>(x.rows)) {
        std::iota(order_.begin(), order_.end(), std::int64_t{0});
        std::stable_sort(order_.begin(), order_.end(),
                         [rows](std::int64_t a, std::int64_t b) { return rows[a] < rows[b]; });
        for (std::int64_t t = 0; t < x.rows; ++t) {
            const std::int64_t row = rows[order_[index(t)]];
            if (t == 0 || row != rows[order_[index(t - 1)]]) segments_.push_back(segment(codes, row, t));
            segments_.back().end = t + 1;
        }
    }

    void run(int threads) {
        pack(threads);
        parallel_for((out_.cols + task_rows - 1) / task_rows, threads, [&](std::int64_t task) {
            const std::int64_t first = task * task_rows, rows = std::min(task_rows, out_.cols - first);
            thread_local std::vector<float> results;
            results.assign(index(x_.rows * task_rows), 0.0F);
            multiply_few(first, rows, results.data());
            multiply_many(first, rows, results.data());
            for (std::int64_t t = 0; t < x_.rows; ++t) {
                round_({results.data() + t * task_rows, task_rows, 1, rows},
                       static_cast<unsigned char*>(out_.data) + order_[index(t)] * row_bytes(out_) +
                           first * static_cast<std::int64_t>(size_of(out_.dtype)),
                       row_bytes(out_));
            }
        });
    }

  private:
    static std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

    Segment segment(const CsrView& codes, std::int64_t row, std::int64_t begin) const {
        Segment made{begin, begin, {}, {}};
        for (std::int64_t k = codes.indptr[row]; k < codes.indptr[row + 1]; ++k) {
            made.places.push_back(codes.indices[k] * row_bytes(bank_));
            made.terms.push_back({made.places.back(), codes.values[k]});
        }
        return made;
    }

    const unsigned char* token(std::int64_t sorted) const {
        return static_cast<const unsigned char*>(x_.data) + order_[index(sorted)] * row_bytes(x_);
    }

    const unsigned char* atoms(std::int64_t row, std::int64_t col) const {
        return static_cast<const unsigned char*>(bank_.data) +
               (row * x_.cols + col) * static_cast<std::int64_t>(size_of(bank_.dtype));
    }

    // Few tokens of a mixture are arranged, many are packed in panels; places are those of the sorted tokens.
    void pack(int threads) {
        std::int64_t words = 0;
        for (const Segment& segment : segments_) {
            starts_.push_back(words);
            words += segment.few() ? segment.tokens() * x_.cols
                                   : (segment.tokens() + panel_ - 1) / panel_ * panel_ * x_.cols;
        }
        packed_.resize(index(words));
        arranged_.resize(index(words));
        parallel_for(static_cast<std::int64_t>(segments_.size()), threads, [&](std::int64_t number) {
            const Segment& segment = segments_[index(number)];
            if (segment.few()) {
                const auto arrange = kernels_.arrange[index_of(bank_.dtype)][index_of(x_.dtype)];
                for (std::int64_t t = 0; t < segment.tokens(); ++t) {
                    arrange(token(segment.begin + t), x_.cols,
                            arranged_.data() + starts_[index(number)] + t * x_.cols);
                }
                return;
            }
            thread_local std::vector<unsigned char> gathered;
            gathered.resize(index(panel_ * row_bytes(x_)));
            for (std::int64_t t = 0; t < segment.tokens(); t += panel_) {
                const std::int64_t count = std::min(panel_, segment.tokens() - t);
                for (std::int64_t i = 0; i < count; ++i) {
                    std::memcpy(gathered.data() + i * row_bytes(x_), token(segment.begin + t + i),
                                index(x_.cols * static_cast<std::int64_t>(size_of(x_.dtype))));
                }
                const detail::PanelSource source{gathered.data(), row_bytes(x_), count, x_.cols, nullptr};
                std::uint32_t* to = packed_.data() + starts_[index(number)] + t * x_.cols;
                if (pairs_) {
                    gram_.pack_pairs(source, to);
                } else {
                    gram_.pack[index_of(x_.dtype)](source, to);
                }
            }
        });
    }

    void multiply_few(std::int64_t first, std::int64_t rows, float* results) const {
        const auto multiply = kernels_.multiply_row[index_of(bank_.dtype)];
        for (std::int64_t i = 0; i < rows; ++i) {
            check_interrupt();
            for (std::size_t s = 0; s < segments_.size(); ++s) {
                const Segment& segment = segments_[s];
                if (!segment.few()) continue;
                float products[detail::few_tokens];
                multiply({atoms(first + i, 0), segment.terms.data(),
                          static_cast<std::int64_t>(segment.terms.size()), x_.cols},
                         arranged_.data() + starts_[s], x_.cols, segment.tokens(), products);
                for (std::int64_t t = 0; t < segment.tokens(); ++t)
                    results[(segment.begin + t) * task_rows + i] = products[t];
            }
        }
    }

    void multiply_many(std::int64_t first, std::int64_t rows, float* results) const {
        const auto panels = [this](const Segment& segment) {
            return (segment.tokens() + panel_ - 1) / panel_;
        };
        std::int64_t all = 0;
        for (const Segment& segment : segments_) {
            if (!segment.few()) all += panels(segment);
        }
        thread_local std::vector<std::uint32_t> tile;
        thread_local std::vector<float> sums;
        tile.resize(index(task_rows * tile_cols));
        sums.assign(index(all * panel_ * task_rows), 0.0F);
        for (std::int64_t col = 0; col < x_.cols; col += tile_cols) {
            const std::int64_t width = std::min(tile_cols, x_.cols - col);
            float* to = sums.data();
            for (std::size_t s = 0; s < segments_.size(); ++s) {
                const Segment& segment = segments_[s];
                if (segment.few()) continue;
                check_interrupt();
                compose_tile(segment, first, rows, col, width, tile.data());
                const detail::MixtureTile made{tile.data(), rows, pairs_ ? tile_cols / 2 : tile_cols,
                                               pairs_ ? (width + 1) / 2 : width};
                for (std::int64_t p = 0; p < panels(segment); ++p, to += panel_ * task_rows) {
                    const std::uint32_t* x = packed_.data() + starts_[s] + p * panel_ * x_.cols +
                                             (pairs_ ? col / 2 : col) * panel_;
                    (pairs_ ? kernels_.multiply_pairs : kernels_.multiply_tile)(
                        made, x, std::min(panel_, segment.tokens() - p * panel_), to);
                }
            }
        }
        const float* from = sums.data();
        for (const Segment& segment : segments_) {
            if (segment.few()) continue;
            for (std::int64_t t = 0; t < segment.tokens(); ++t) {
                const float* column = from + t / panel_ * panel_ * task_rows + t % panel_;
                for (std::int64_t i = 0; i < rows; ++i)
                    results[(segment.begin + t) * task_rows + i] = column[i * panel_];
            }
            from += panels(segment) * panel_ * task_rows;
        }
    }

    void compose_tile(const Segment& segment, std::int64_t first, std::int64_t rows, std::int64_t col,
                      std::int64_t width, std::uint32_t* tile) const {
        const DType dtype = pairs_ ? DType::bfloat16 : DType::float32;
        const auto compose = detail::variant().compose[index_of(bank_.dtype)][index_of(dtype)];
        const auto count = static_cast<std::int64_t>(segment.terms.size());
        const std::int64_t range[2] = {0, count};
        const std::int64_t bytes = width * static_cast<std::int64_t>(size_of(bank_.dtype));
        auto* to = reinterpret_cast<unsigned char*>(tile);
        for (std::int64_t i = 0; i < rows; ++i) {
            detail::Ahead ahead{atoms(first + i + 1, col), segment.places.data(), i + 1 < rows ? count : 0,
                                bytes + 63, 2 + count * 2};
            compose({atoms(first + i, col), segment.terms.data(), range, 1, width},
                    to + i * tile_cols * static_cast<std::int64_t>(size_of(dtype)), 0, false, ahead);
        }
    }

    const ConstMatrixView bank_, x_;
    const MatrixView out_;
    const detail::ComposeMatmulKernels& kernels_ = detail::variant().compose_matmul;
    const detail::GramKernels& gram_ = detail::variant().gram;
    const detail::RoundSums round_ = detail::variant().round_sums[index_of(out_.dtype)];
    const bool pairs_ = kernels_.multiply_pairs != nullptr && bank_.dtype == DType::bfloat16 &&
                        x_.dtype == DType::bfloat16 && x_.cols % 2 == 0;
    const std::int64_t panel_ = gram_.panel;
    std::vector<std::int64_t> order_, starts_;
    std::vector<Segment> segments_;
    std::vector<std::uint32_t> packed_;
    std::vector<float> arranged_;
};

}  // namespace

void compose_matmul(const CsrView& codes, const ConstMatrixView& bank, const std::int64_t* rows,
                    const ConstMatrixView& x, const MatrixView& out, int threads) {
    validate(codes, bank, rows, x, out);
    Product(codes, bank, rows, x, out).run(threads);
}

}  // namespace globe
