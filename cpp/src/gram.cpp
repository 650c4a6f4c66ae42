#include "globe/gram.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

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
void add(const ConstMatrixView& vectors, double* gram, std::int64_t begin, std::int64_t end,
         const float* weights, int threads) {
    const std::int64_t n = vectors.rows;
    if (!(0 <= begin && begin <= end && end <= n)) {
        throw std::invalid_argument("begin, end: found " + std::to_string(begin) + ", " +
                                    std::to_string(end) + "; expected a range of the " + std::to_string(n) +
                                    " vectors");
    }
    const std::vector<float> roots = roots_of(weights, vectors.cols);
    const detail::GramKernels& kernels = detail::variant().gram;
    const bool pairs =
        kernels.pack_pairs != nullptr && vectors.dtype == DType::bfloat16 && weights == nullptr;
    const auto pack = pairs ? kernels.pack_pairs : kernels.pack[detail::index_of(vectors.dtype)];
    const auto multiply = pairs ? kernels.multiply_pairs : kernels.multiply;
    const std::int64_t block = pairs ? 2 * block_words : block_words;
    const std::int64_t panel = kernels.panel, panel_words = panel * block_words;

    // Left panels cover [begin, end), right panels [0, end); they are the same ones where begin is 0.
    const std::int64_t left = (end - begin + panel - 1) / panel, right = (end + panel - 1) / panel;
    const std::int64_t separate = begin > 0 ? left : 0;
    std::vector<std::uint32_t> packed(static_cast<std::size_t>((right + separate) * panel_words));
    struct Tile {
        std::int64_t row, col;  // panels
    };
    std::vector<Tile> tiles;
    for (std::int64_t i = 0; i < left; ++i) {
        const std::int64_t last = std::min(begin + (i + 1) * panel, end);
        for (std::int64_t j = 0; j * panel < last; ++j) tiles.push_back({i, j});
    }

    const auto* data = static_cast<const unsigned char*>(vectors.data);
    for (std::int64_t offset = 0; offset < vectors.cols; offset += block) {
        const std::int64_t depth = std::min(block, vectors.cols - offset);
        const std::int64_t steps = pairs ? (depth + 1) / 2 : depth;
        parallel_for(right + separate, threads, [&](std::int64_t p) {
            const std::int64_t first = p < right ? p * panel : begin + (p - right) * panel;
            pack({data + first * row_bytes(vectors) +
                      offset * static_cast<std::int64_t>(size_of(vectors.dtype)),
                  row_bytes(vectors), std::min(panel, end - first), depth,
                  roots.empty() ? nullptr : roots.data() + offset},
                 packed.data() + p * panel_words);
        });
        parallel_for(static_cast<std::int64_t>(tiles.size()), threads, [&](std::int64_t number) {
            const Tile tile = tiles[static_cast<std::size_t>(number)];
            const std::int64_t row = begin + tile.row * panel, col = tile.col * panel;
            const std::int64_t left_panel = separate > 0 ? right + tile.row : tile.row;
            multiply(packed.data() + left_panel * panel_words, packed.data() + tile.col * panel_words, steps,
                     gram + row * n + col, n, std::min(panel, end - row), std::min(panel, end - col));
        });
    }
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
        for (std::int64_t left = 0; left <= top; left += side) {
            for (std::int64_t j = left; j < std::min(left + side, n); ++j) {
                for (std::int64_t i = std::max(top, j + 1); i < std::min(top + side, n); ++i)
                    gram[j * n + i] = gram[i * n + j];
            }
        }
    }
}

}  // namespace globe
