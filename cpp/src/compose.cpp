#include "globe/compose.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "globe/parallel.hpp"
#include "variant.hpp"

namespace globe {
namespace {

using detail::Term;

// Bytes of the bank that a tile takes: they stay in a core's second-level cache while every row reads them.
constexpr std::int64_t tile_bytes = 512 * 1024;
constexpr std::int64_t shortest_tile = 512, longest_tile = 8192;

// A fixed number of column ranges, so that sums over ranges do not depend on the number of threads.
constexpr std::int64_t column_ranges = 64;

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

std::string shape_of(std::int64_t rows, std::int64_t cols) {
    return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
}

void validate(const CsrView& codes, const ConstMatrixView& bank) {
    require(bank.rows == codes.cols, "bank: found " + std::to_string(bank.rows) + " atoms; expected " +
                                         std::to_string(codes.cols) + ", one per column of codes");
    require(codes.indptr[0] == 0 && codes.indptr[codes.rows] == codes.nnz,
            "codes: indptr must start at 0 and end at the number of stored entries");
    for (std::int64_t i = 0; i < codes.rows; ++i) {
        require(codes.indptr[i] <= codes.indptr[i + 1], "codes: indptr falls at row " + std::to_string(i));
    }
    for (std::int64_t k = 0; k < codes.nnz; ++k) {
        require(codes.indices[k] >= 0 && codes.indices[k] < codes.cols,
                "codes: found column " + std::to_string(codes.indices[k]) + "; expected 0 to " +
                    std::to_string(codes.cols - 1));
    }
}

std::int64_t tile_width(const ConstMatrixView& bank) {
    const auto per_column =
        std::max<std::int64_t>(1, bank.rows) * static_cast<std::int64_t>(size_of(bank.dtype));
    const std::int64_t width = tile_bytes / per_column / 256 * 256;
    return std::clamp(width, shortest_tile, longest_tile);
}

}  // namespace

void compose_rows(const CsrView& codes, const ConstMatrixView& bank, const MatrixView& out,
                  std::int64_t begin, std::int64_t end, float epsilon) {
    require(0 <= begin && begin <= end && end <= codes.rows,
            "begin, end: found " + shape_of(begin, end) + "; expected a range of the " +
                std::to_string(codes.rows) + " rows of codes");
    const std::int64_t rows = end - begin;
    std::vector<std::int64_t> offsets(codes.indptr + begin, codes.indptr + end + 1);
    const std::int64_t first = offsets.front();
    for (auto& offset : offsets) offset -= first;
    const CsrView part{offsets.data(), codes.indices + first, codes.values + first, rows,
                       codes.cols,     offsets.back()};
    auto* target = static_cast<unsigned char*>(out.data) + begin * row_bytes(out);
    compose(part, bank, {target, rows, out.cols, out.dtype, out.stride}, epsilon, 1);
}

void compose(const CsrView& codes, const ConstMatrixView& bank, const MatrixView& out, float epsilon,
             int threads) {
    require(epsilon >= 0.0F, "epsilon: found a negative number or NaN; expected epsilon >= 0");
    validate(codes, bank);
    require(
        out.rows == codes.rows && out.cols == bank.cols,
        "out: found shape " + shape_of(out.rows, out.cols) + "; expected " + shape_of(codes.rows, bank.cols));

    // The entries that count, found once for all tiles.
    std::vector<Term> terms;
    std::vector<std::int64_t> starts{0};
    terms.reserve(static_cast<std::size_t>(codes.nnz));
    starts.reserve(static_cast<std::size_t>(codes.rows) + 1);
    const auto* atoms = static_cast<const unsigned char*>(bank.data);
    for (std::int64_t i = 0; i < codes.rows; ++i) {
        for (std::int64_t k = codes.indptr[i]; k < codes.indptr[i + 1]; ++k) {
            if (std::fabs(codes.values[k]) < epsilon) continue;
            terms.push_back({atoms + codes.indices[k] * row_bytes(bank), codes.values[k]});
        }
        starts.push_back(static_cast<std::int64_t>(terms.size()));
    }

    const auto row = detail::variant().compose[detail::index_of(bank.dtype)][detail::index_of(out.dtype)];
    auto* target = static_cast<unsigned char*>(out.data);
    const auto entry_bytes = static_cast<std::int64_t>(size_of(out.dtype));
    const std::int64_t wide = tile_width(bank);
    const std::int64_t tiles = (bank.cols + wide - 1) / wide;
    parallel_for(tiles, threads, [&](std::int64_t tile) {
        const std::int64_t offset = tile * wide;
        const std::int64_t width = std::min(wide, bank.cols - offset);
        for (std::int64_t i = 0; i < codes.rows; ++i) {
            const std::int64_t start = starts[static_cast<std::size_t>(i)];
            const std::int64_t stop = starts[static_cast<std::size_t>(i) + 1];
            row(terms.data() + start, stop - start, offset, width,
                target + i * row_bytes(out) + offset * entry_bytes);
        }
    });
}

void compose_code_gradient(const CsrView& codes, const ConstMatrixView& gradient, const ConstMatrixView& bank,
                           double* products, int threads) {
    validate(codes, bank);
    require(gradient.rows == codes.rows && gradient.cols == bank.cols,
            "gradient: found shape " + shape_of(gradient.rows, gradient.cols) + "; expected " +
                shape_of(codes.rows, bank.cols));
    const auto dot = detail::variant().dot[detail::index_of(gradient.dtype)][detail::index_of(bank.dtype)];
    const auto* rows = static_cast<const unsigned char*>(gradient.data);
    const auto* atoms = static_cast<const unsigned char*>(bank.data);
    const auto row_entry = static_cast<std::int64_t>(size_of(gradient.dtype));
    const auto atom_entry = static_cast<std::int64_t>(size_of(bank.dtype));
    const std::int64_t wide = tile_width(bank);
    const std::int64_t tiles = (bank.cols + wide - 1) / wide;
    const std::int64_t ranges = std::min(tiles, column_ranges);

    std::vector<double> partial(static_cast<std::size_t>(ranges * codes.nnz), 0.0);
    parallel_for(ranges, threads, [&](std::int64_t range) {
        double* sums = partial.data() + range * codes.nnz;
        for (std::int64_t tile = range * tiles / ranges; tile < (range + 1) * tiles / ranges; ++tile) {
            const std::int64_t offset = tile * wide;
            const std::int64_t width = std::min(wide, bank.cols - offset);
            for (std::int64_t i = 0; i < codes.rows; ++i) {
                const auto* row = rows + i * row_bytes(gradient) + offset * row_entry;
                for (std::int64_t k = codes.indptr[i]; k < codes.indptr[i + 1]; ++k) {
                    sums[k] +=
                        dot(row, atoms + codes.indices[k] * row_bytes(bank) + offset * atom_entry, width);
                }
            }
        }
    });
    std::fill(products, products + codes.nnz, 0.0);
    for (std::int64_t range = 0; range < ranges; ++range) {
        for (std::int64_t k = 0; k < codes.nnz; ++k) products[k] += partial[range * codes.nnz + k];
    }
}

}  // namespace globe
