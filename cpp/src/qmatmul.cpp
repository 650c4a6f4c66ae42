#include "globe/qmatmul.hpp"

#include <algorithm>
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

constexpr std::int64_t longest_group = 256;  // sums of 16-bit times 8-bit integers stay below 2^31

// Tokens whose sums are kept while a panel of weights is read, and rows rounded by one task.
constexpr std::int64_t block_tokens = 512, rows_a_task = 16;

void validate(const ConstMatrixView& x, const PackedView& weights, const ConstMatrixView& scales,
              const MatrixView& out) {
    require(weights.bits == 4 || weights.bits == 8,
            "bits: found " + std::to_string(weights.bits) + "; expected 4 or 8");
    const std::int64_t in_word = 32 / weights.bits;
    require(weights.rows >= 0 && weights.cols >= 0 && weights.cols % in_word == 0,
            "weights: found shape " + shape_of(weights.rows, weights.cols) + "; expected a multiple of " +
                std::to_string(in_word) + " columns");
    require(x.cols == weights.cols, "x: found " + std::to_string(x.cols) + " columns; expected " +
                                        std::to_string(weights.cols) + ", as the weights have");
    require(scales.rows == weights.rows, "scales: found " + std::to_string(scales.rows) + " rows; expected " +
                                             std::to_string(weights.rows) + ", as the weights have");
    require(
        out.rows == x.rows && out.cols == weights.rows,
        "out: found shape " + shape_of(out.rows, out.cols) + "; expected " + shape_of(x.rows, weights.rows));
    if (weights.cols == 0) return;
    const std::int64_t group = scales.cols > 0 ? weights.cols / scales.cols : 0;
    require(
        group > 0 && group * scales.cols == weights.cols && group % in_word == 0 && group <= longest_group,
        "scales: found " + std::to_string(scales.cols) + " groups for " + std::to_string(weights.cols) +
            " columns; expected groups of one size, a multiple of " + std::to_string(in_word) +
            " and at most " + std::to_string(longest_group));
}

// Activations as integers, by token; see simd/qmatmul.hpp.
struct Rounded {
    std::vector<std::uint32_t> pairs;
    std::vector<float> scales;
    std::vector<std::int32_t> starts;
};

Rounded round(const ConstMatrixView& x, const detail::Rounding& rounding, int threads) {
    const std::int64_t pitch = x.cols / 2, groups = rounding.groups;
    Rounded rounded{std::vector<std::uint32_t>(static_cast<std::size_t>(x.rows * pitch)),
                    std::vector<float>(static_cast<std::size_t>(x.rows * groups)),
                    std::vector<std::int32_t>(static_cast<std::size_t>(x.rows * groups))};
    const auto round_row = detail::variant().qmatmul.round[detail::index_of(x.dtype)];
    parallel_for((x.rows + rows_a_task - 1) / rows_a_task, threads, [&](std::int64_t task) {
        for (std::int64_t t = task * rows_a_task; t < std::min(x.rows, (task + 1) * rows_a_task); ++t) {
            round_row(static_cast<const unsigned char*>(x.data) + t * row_bytes(x), rounding,
                      rounded.pairs.data() + t * pitch, rounded.scales.data() + t * groups,
                      rounded.starts.data() + t * groups);
        }
    });
    return rounded;
}

}  // namespace

void qmatmul(const ConstMatrixView& x, const PackedView& weights, const ConstMatrixView& scales,
             const MatrixView& out, int threads) {
    validate(x, weights, scales, out);
    const detail::QmatmulKernels& kernels = detail::variant().qmatmul;
    const std::int64_t words = weights.cols * weights.bits / 32, groups = weights.cols > 0 ? scales.cols : 0;
    const int parts = 16 / weights.bits, which = weights.bits / 8;
    const detail::Rounding rounding{groups, groups > 0 ? weights.cols / groups : 0, parts,
                                    1 << (weights.bits - 1)};
    const Rounded rounded = round(x, rounding, threads);

    const std::int64_t panel = kernels.panel, tokens = std::min(x.rows, block_tokens);
    const auto round_sums = detail::variant().round_sums[detail::index_of(out.dtype)];
    const bool expanded = x.rows > kernels.unexpanded;
    const auto size = [](std::int64_t count) { return static_cast<std::size_t>(count); };
    parallel_for((weights.rows + panel - 1) / panel, threads, [&](std::int64_t number) {
        thread_local std::vector<std::uint32_t> transposed, pairs, wide, laid;
        thread_local std::vector<float> sums;
        transposed.resize(size(words * panel));
        pairs.resize(size(expanded ? words * panel * parts : 0));
        wide.resize(size(groups * panel));
        laid.resize(size(groups * panel));
        sums.resize(size(tokens * panel));
        const std::int64_t first = number * panel, rows = std::min(panel, weights.rows - first);
        const auto* source = reinterpret_cast<const std::uint32_t*>(weights.words) + first * words;
        kernels.transpose({source, rows, words}, transposed.data());
        if (expanded) kernels.expand[which](transposed.data(), words, pairs.data());
        kernels.widen[detail::index_of(scales.dtype)](
            static_cast<const unsigned char*>(scales.data) + first * row_bytes(scales), row_bytes(scales),
            rows, groups, wide.data());
        kernels.transpose({wide.data(), rows, groups}, laid.data());
        for (std::int64_t begin = 0; begin < x.rows; begin += tokens) {
            check_interrupt();
            const std::int64_t count = std::min(tokens, x.rows - begin);
            const detail::QmatmulTask task{expanded ? pairs.data() : transposed.data(),
                                           laid.data(),
                                           source + panel * words,
                                           rounded.pairs.data() + begin * x.cols / 2,
                                           rounded.scales.data() + begin * groups,
                                           rounded.starts.data() + begin * groups,
                                           x.cols / 2,
                                           groups,
                                           groups > 0 ? (expanded ? words * parts : words) / groups : 0,
                                           count};
            (expanded ? kernels.multiply_pairs : kernels.multiply[which])(task, sums.data());
            round_sums({sums.data(), panel, count, rows},
                       static_cast<unsigned char*>(out.data) + begin * row_bytes(out) +
                           first * static_cast<std::int64_t>(size_of(out.dtype)),
                       row_bytes(out));
        }
    });
}

}  // namespace globe
