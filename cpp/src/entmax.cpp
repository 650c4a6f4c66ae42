#include "globe/entmax.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "globe/parallel.hpp"
#include "variant.hpp"

namespace globe {
namespace {

using detail::EntmaxTask;

// Numbers that one task of the pool reads, and those that are worth a second thread.
constexpr std::int64_t block_size = 1 << 14, smallest_shared = 1 << 15;

template <class T>
constexpr int type_of = sizeof(T) == sizeof(float) ? 0 : 1;

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

std::string shape_of(std::int64_t rows, std::int64_t cols) {
    return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
}

template <class A, class B>
void require_same_shape(const char* name, const RowsView<A>& found, const RowsView<B>& expected) {
    require(found.rows == expected.rows && found.cols == expected.cols,
            std::string(name) + ": found shape " + shape_of(found.rows, found.cols) + "; expected " +
                shape_of(expected.rows, expected.cols));
}

void validate(const EntmaxOptions& options) {
    require(options.alpha > 1.0 && options.alpha <= 2.0,
            "alpha: found " + std::to_string(options.alpha) + "; expected a number in (1, 2]");
    require(
        options.temperature > 0.0 && std::isfinite(options.temperature),
        "temperature: found " + std::to_string(options.temperature) + "; expected a finite number above 0");
    require(options.epsilon >= 0.0 && options.epsilon < 1.0,
            "epsilon: found " + std::to_string(options.epsilon) + "; expected a number in [0, 1)");
}

void require_range(std::int64_t begin, std::int64_t end, std::int64_t rows) {
    require(0 <= begin && begin <= end && end <= rows, "begin, end: found " + shape_of(begin, end) +
                                                           "; expected a range of the " +
                                                           std::to_string(rows) + " rows");
}

// Calls visit(begin, end) on blocks of rows.
template <class Visit>
void for_blocks(std::int64_t rows, std::int64_t cols, int threads, const Visit& visit) {
    if (rows == 0 || cols == 0) return;
    const std::int64_t block = std::max<std::int64_t>(1, block_size / cols);
    const std::int64_t blocks = (rows + block - 1) / block;
    parallel_for(blocks, rows * cols < smallest_shared ? 1 : threads,
                 [&](std::int64_t number) { visit(number * block, std::min((number + 1) * block, rows)); });
}

template <class T>
T* scratch(std::int64_t size) {
    thread_local std::vector<T> kept;
    if (static_cast<std::int64_t>(kept.size()) < size) kept.resize(static_cast<std::size_t>(size));
    return kept.data();
}

// The first bad row of [begin, end), or end.
template <class T>
std::int64_t forward(const RowsView<const T>& logits, const RowsView<T>& probabilities,
                     const EntmaxOptions& options, std::int64_t begin, std::int64_t end) {
    const EntmaxTask task{options.alpha,
                          options.temperature,
                          options.epsilon,
                          end - begin,
                          logits.cols,
                          logits.pitch(),
                          0,
                          probabilities.pitch()};
    return begin + detail::variant().entmax.forward[type_of<T>](
                       task, logits.data + begin * logits.pitch(),
                       probabilities.data + begin * probabilities.pitch(), scratch<T>(logits.cols + 64));
}

void require_good(std::int64_t row, std::int64_t rows) {
    require(row == rows, "logits: found NaN, +inf or nothing but -inf in row " + std::to_string(row) +
                             "; expected at least one finite logit per row, the others finite or -inf");
}

template <class T>
void backward(const RowsView<const T>& probabilities, const RowsView<const T>& gradient,
              const RowsView<T>& out, const EntmaxOptions& options, std::int64_t begin, std::int64_t end) {
    const EntmaxTask task{options.alpha,    options.temperature, 0.0,
                          end - begin,      probabilities.cols,  probabilities.pitch(),
                          gradient.pitch(), out.pitch()};
    detail::variant().entmax.backward[type_of<T>](task, probabilities.data + begin * probabilities.pitch(),
                                                  gradient.data + begin * gradient.pitch(),
                                                  out.data + begin * out.pitch());
}

}  // namespace

template <class T>
void entmax(const RowsView<const T>& logits, const RowsView<T>& probabilities, const EntmaxOptions& options,
            int threads) {
    validate(options);
    require_same_shape("probabilities", probabilities, logits);
    require(logits.cols > 0, "logits: found rows of 0 entries; expected at least 1");
    std::atomic<std::int64_t> first{logits.rows};
    for_blocks(logits.rows, logits.cols, threads, [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t row = forward(logits, probabilities, options, begin, end);
        if (row == end) return;
        std::int64_t known = first.load();
        while (row < known && !first.compare_exchange_weak(known, row)) {
        }
    });
    require_good(first, logits.rows);
}

template <class T>
void entmax_rows(const RowsView<const T>& logits, const RowsView<T>& probabilities, std::int64_t begin,
                 std::int64_t end, const EntmaxOptions& options) {
    validate(options);
    require_same_shape("probabilities", probabilities, logits);
    require(logits.cols > 0, "logits: found rows of 0 entries; expected at least 1");
    require_range(begin, end, logits.rows);
    require_good(forward(logits, probabilities, options, begin, end), end);
}

template <class T>
void entmax_backward(const RowsView<const T>& probabilities, const RowsView<const T>& gradient,
                     const RowsView<T>& out, const EntmaxOptions& options, int threads) {
    validate(options);
    require_same_shape("gradient", gradient, probabilities);
    require_same_shape("out", out, probabilities);
    for_blocks(probabilities.rows, probabilities.cols, threads, [&](std::int64_t begin, std::int64_t end) {
        backward(probabilities, gradient, out, options, begin, end);
    });
}

template <class T>
void entmax_backward_rows(const RowsView<const T>& probabilities, const RowsView<const T>& gradient,
                          const RowsView<T>& out, std::int64_t begin, std::int64_t end,
                          const EntmaxOptions& options) {
    validate(options);
    require_same_shape("gradient", gradient, probabilities);
    require_same_shape("out", out, probabilities);
    require_range(begin, end, probabilities.rows);
    backward(probabilities, gradient, out, options, begin, end);
}

#define GLOBE_INSTANTIATE(T)                                                                              \
    template void entmax(const RowsView<const T>&, const RowsView<T>&, const EntmaxOptions&, int);        \
    template void entmax_rows(const RowsView<const T>&, const RowsView<T>&, std::int64_t, std::int64_t,   \
                              const EntmaxOptions&);                                                      \
    template void entmax_backward(const RowsView<const T>&, const RowsView<const T>&, const RowsView<T>&, \
                                  const EntmaxOptions&, int);                                             \
    template void entmax_backward_rows(const RowsView<const T>&, const RowsView<const T>&,                \
                                       const RowsView<T>&, std::int64_t, std::int64_t, const EntmaxOptions&)
GLOBE_INSTANTIATE(float);
GLOBE_INSTANTIATE(double);

}  // namespace globe
