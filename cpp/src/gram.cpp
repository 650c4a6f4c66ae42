#include "globe/gram.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "globe/interrupt.hpp"
#include "globe/parallel.hpp"
#include "variant.hpp"

namespace globe {
namespace {

// Words per row that are packed at a time: 512 rows take 1 MiB, so that the panels stay in the second-level
// cache.
constexpr std::int64_t block_words = 512;

std::vector<float> roots_of(const float* weights, std::int64_t count) {
    std::vector<float> roots;
    if (weights == nullptr) return roots;
    roots.reserve(static_cast<std::size_t>(count));
    for (std::int64_t t = 0; t < count; ++t) {
        if (!(weights[t] >= 0.0F) || std::isinf(weights[t])) {
            throw std::invalid_argument("weights: found " + std::to_string(weights[t]) + " at column " +
                                        std::to_string(t) + "; expected finite numbers of at least 0");
        }
        roots.push_back(std::sqrt(weights[t]));
    }
    return roots;
}

// The part of the lower triangle in rows [begin, end), panel by panel.
class LowerTriangle {
  public:
    LowerTriangle(const ConstMatrixView& vectors, double* gram, std::int64_t begin, std::int64_t end,
                  const float* weights, int threads)
        : vectors_(vectors),
          gram_(gram),
          begin_(begin),
          end_(end),
          threads_(threads),
          roots_(roots_of(weights, vectors.cols)),
          left_((end - begin + panel_ - 1) / panel_),
          right_((end + panel_ - 1) / panel_),
          separate_(begin > 0 ? left_ : 0),
          packed_(static_cast<std::size_t>((right_ + separate_) * panel_words_)) {
        for (std::int64_t i = 0; i < left_; ++i) {
            const std::int64_t last = std::min(begin + (i + 1) * panel_, end);
            for (std::int64_t j = 0; j * panel_ < last; ++j) tiles_.push_back({i, j});
        }
    }

    void add() {
        const bool pairs =
            kernels_.pack_pairs != nullptr && vectors_.dtype == DType::bfloat16 && roots_.empty();
        const std::int64_t block = pairs ? 2 * block_words : block_words;
        for (std::int64_t offset = 0; offset < vectors_.cols; offset += block) {
            const std::int64_t depth = std::min(block, vectors_.cols - offset);
            if (pairs && add_pairs(offset, depth)) continue;
            for (std::int64_t part = offset; part < offset + depth; part += block_words) {
                add_float32(part, std::min(block_words, offset + depth - part));
            }
        }
    }

  private:
    // False, and nothing added, where the columns hold subnormal numbers in any row, so that the bits do not
    // depend on the range of rows.
    bool add_pairs(std::int64_t offset, std::int64_t depth) {
        std::atomic<bool> subnormal{false};
        for (std::int64_t row = end_; row < vectors_.rows; ++row) {  // which are not packed
            const auto* entries = reinterpret_cast<const std::uint16_t*>(place(row, offset));
            for (std::int64_t t = 0; t < depth; ++t) {
                const unsigned magnitude = entries[t] & 0x7FFFU;
                if (magnitude != 0 && magnitude < 0x80U) subnormal = true;
            }
        }
        parallel_for(right_ + separate_, threads_, [&](std::int64_t p) {
            if (kernels_.pack_pairs(source(p, offset, depth), panel(p))) subnormal = true;
        });
        if (!subnormal) multiply(kernels_.multiply_pairs, (depth + 1) / 2);
        return !subnormal;
    }

    void add_float32(std::int64_t offset, std::int64_t depth) {
        const auto pack = kernels_.pack[detail::index_of(vectors_.dtype)];
        parallel_for(right_ + separate_, threads_,
                     [&](std::int64_t p) { pack(source(p, offset, depth), panel(p)); });
        multiply(kernels_.multiply, depth);
    }

    const unsigned char* place(std::int64_t row, std::int64_t col) const {
        return static_cast<const unsigned char*>(vectors_.data) + row * row_bytes(vectors_) +
               col * static_cast<std::int64_t>(size_of(vectors_.dtype));
    }

    detail::PanelSource source(std::int64_t p, std::int64_t offset, std::int64_t depth) const {
        const std::int64_t first = p < right_ ? p * panel_ : begin_ + (p - right_) * panel_;
        return {place(first, offset), row_bytes(vectors_), std::min(panel_, end_ - first), depth,
                roots_.empty() ? nullptr : roots_.data() + offset};
    }

    std::uint32_t* panel(std::int64_t p) { return packed_.data() + p * panel_words_; }

    void multiply(detail::Multiply multiply_panels, std::int64_t steps) {
        const std::int64_t n = vectors_.rows;
        parallel_for(static_cast<std::int64_t>(tiles_.size()), threads_, [&](std::int64_t number) {
            const Tile tile = tiles_[static_cast<std::size_t>(number)];
            const std::int64_t row = begin_ + tile.row * panel_, col = tile.col * panel_;
            const std::int64_t left_panel = separate_ > 0 ? right_ + tile.row : tile.row;
            multiply_panels(packed_.data() + left_panel * panel_words_,
                            packed_.data() + tile.col * panel_words_, steps, gram_ + row * n + col, n,
                            std::min(panel_, end_ - row), std::min(panel_, end_ - col));
        });
    }

    struct Tile {
        std::int64_t row, col;  // panels
    };

    const ConstMatrixView& vectors_;
    double* const gram_;
    const std::int64_t begin_, end_;
    const int threads_;
    const detail::GramKernels& kernels_ = detail::variant().gram;
    const std::int64_t panel_ = kernels_.panel, panel_words_ = panel_ * block_words;
    const std::vector<float> roots_;
    // Left panels cover [begin, end), right panels [0, end); they are the same ones where begin is 0.
    const std::int64_t left_, right_, separate_;
    std::vector<std::uint32_t> packed_;
    std::vector<Tile> tiles_;
};

void add(const ConstMatrixView& vectors, double* gram, std::int64_t begin, std::int64_t end,
         const float* weights, int threads) {
    if (!(0 <= begin && begin <= end && end <= vectors.rows)) {
        throw std::invalid_argument("begin, end: found " + std::to_string(begin) + ", " +
                                    std::to_string(end) + "; expected a range of the " +
                                    std::to_string(vectors.rows) + " vectors");
    }
    LowerTriangle(vectors, gram, begin, end, weights, threads).add();
}

}  // namespace

void gram_add(const ConstMatrixView& vectors, double* gram, const float* weights, int threads) {
    add(vectors, gram, 0, vectors.rows, weights, threads);
}

void gram_add_rows(const ConstMatrixView& vectors, double* gram, std::int64_t begin, std::int64_t end,
                   const float* weights) {
    add(vectors, gram, begin, end, weights, 1);
}

void gram_mirror(double* gram, std::int64_t n) {
    constexpr std::int64_t side = 32;  // in tiles, so that lines of the upper triangle are filled at once
    for (std::int64_t top = 0; top < n; top += side) {
        check_interrupt();
        for (std::int64_t left = 0; left <= top; left += side) {
            for (std::int64_t j = left; j < std::min(left + side, n); ++j) {
                for (std::int64_t i = std::max(top, j + 1); i < std::min(top + side, n); ++i)
                    gram[j * n + i] = gram[i * n + j];
            }
        }
    }
}

}  // namespace globe
