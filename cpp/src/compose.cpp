#include "globe/compose.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "codes.hpp"
#include "globe/interrupt.hpp"
#include "globe/parallel.hpp"
#include "variant.hpp"

namespace globe {
namespace {

using detail::require;
using detail::shape_of;
using detail::Term;

// Bytes of the bank that a tile takes: they stay in a core's second-level cache while every row reads them.
constexpr std::int64_t tile_bytes = 512 * 1024;
constexpr std::int64_t shortest_tile = 512, longest_tile = 8192;

// Outputs of this size and more do not fit in the caches anyway and are written past them.
constexpr std::int64_t streamed_bytes = 8 << 20;

// Terms of a tile between two looks for an interruption: some hundredths of a second.
constexpr std::int64_t terms_a_look = 1 << 17;

// A fixed number of column ranges, so that sums over ranges do not depend on the number of threads.
constexpr std::int64_t column_ranges = 64;

// Memory of the calling thread, kept for the next call, aligned to a cache line.
unsigned char* scratch(std::int64_t bytes) {
    thread_local std::vector<unsigned char> kept;
    if (static_cast<std::int64_t>(kept.size()) < bytes + 64)
        kept.resize(static_cast<std::size_t>(bytes + 64));
    return kept.data() + (64 - reinterpret_cast<std::uintptr_t>(kept.data()) % 64) % 64;
}

// The last row, exclusive, with which rows from `row` on have at most so many terms; at least one row.
std::int64_t rows_until(const std::vector<std::int64_t>& starts, std::int64_t row, std::int64_t terms) {
    const auto past = std::upper_bound(starts.begin() + row + 1, starts.end(), starts[row] + terms);
    return std::max<std::int64_t>(row + 1, past - starts.begin() - 1);
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
    detail::check_codes(codes, bank, begin, end);
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
    detail::check_codes(codes, bank, 0, codes.rows);
    require(
        out.rows == codes.rows && out.cols == bank.cols,
        "out: found shape " + shape_of(out.rows, out.cols) + "; expected " + shape_of(codes.rows, bank.cols));

    // The entries that count, and the atoms they use, found once for all tiles. Every thread copies its tile
    // of those atoms to one place: rows of a bank lie a power of two apart more often than not, and would
    // evict one another from the caches.
    const std::int64_t wide = tile_width(bank);
    const std::int64_t pitch = wide * static_cast<std::int64_t>(size_of(bank.dtype)) + 64;
    std::vector<std::int64_t> slots(static_cast<std::size_t>(bank.rows), -1), used;
    std::vector<Term> terms;
    std::vector<std::int64_t> starts{0};
    terms.reserve(static_cast<std::size_t>(codes.nnz));
    starts.reserve(static_cast<std::size_t>(codes.rows) + 1);
    for (std::int64_t i = 0; i < codes.rows; ++i) {
        for (std::int64_t k = codes.indptr[i]; k < codes.indptr[i + 1]; ++k) {
            if (std::fabs(codes.values[k]) < epsilon) continue;
            auto& slot = slots[static_cast<std::size_t>(codes.indices[k])];
            if (slot < 0) {
                slot = static_cast<std::int64_t>(used.size());
                used.push_back(codes.indices[k] * row_bytes(bank));
            }
            terms.push_back({slot * pitch, codes.values[k]});
        }
        starts.push_back(static_cast<std::int64_t>(terms.size()));
    }

    const auto compose_tile =
        detail::variant().compose[detail::index_of(bank.dtype)][detail::index_of(out.dtype)];
    const auto* atoms = static_cast<const unsigned char*>(bank.data);
    auto* target = static_cast<unsigned char*>(out.data);
    const auto in_bytes = static_cast<std::int64_t>(size_of(bank.dtype));
    const auto out_bytes = static_cast<std::int64_t>(size_of(out.dtype));
    const auto atoms_used = std::max<std::int64_t>(1, static_cast<std::int64_t>(used.size()));
    const bool stream = out.rows * row_bytes(out) >= streamed_bytes && row_bytes(out) % 64 == 0 &&
                        reinterpret_cast<std::uintptr_t>(target) % 64 == 0;
    const std::int64_t lines_a_step =
        1 + atoms_used * 128 * in_bytes / 64 / std::max<std::int64_t>(1, out.rows);  // a step is 128 columns

    // Each task is a run of tiles, so that a thread asks ahead for what it will read itself.
    const std::int64_t tiles = (bank.cols + wide - 1) / wide;
    const std::int64_t runs = std::min<std::int64_t>(tiles, 4 * resolve_threads(threads));
    parallel_for(runs, threads, [&](std::int64_t run) {
        unsigned char* packed = scratch(atoms_used * pitch);
        for (std::int64_t number = run * tiles / runs; number < (run + 1) * tiles / runs; ++number) {
            const std::int64_t offset = number * wide;
            const std::int64_t width = std::min(wide, bank.cols - offset);
            for (std::size_t slot = 0; slot < used.size(); ++slot) {
                std::memcpy(packed + static_cast<std::int64_t>(slot) * pitch,
                            atoms + used[slot] + offset * in_bytes,
                            static_cast<std::size_t>(width * in_bytes));
            }
            const std::int64_t next = offset + width;
            const std::int64_t next_bytes = std::min(wide, bank.cols - next) * in_bytes;
            detail::Ahead ahead{atoms + next * in_bytes, used.data(),
                                next_bytes > 0 ? static_cast<std::int64_t>(used.size()) : 0, next_bytes + 63,
                                lines_a_step};
            for (std::int64_t row = 0, end; row < codes.rows; row = end) {
                check_interrupt();
                end = rows_until(starts, row, terms_a_look);
                compose_tile({packed, terms.data(), starts.data() + row, end - row, width},
                             target + row * row_bytes(out) + offset * out_bytes, row_bytes(out), stream,
                             ahead);
            }
        }
    });
}

void compose_code_gradient(const CsrView& codes, const ConstMatrixView& gradient, const ConstMatrixView& bank,
                           double* products, int threads) {
    detail::check_codes(codes, bank, 0, codes.rows);
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
                check_interrupt();
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
