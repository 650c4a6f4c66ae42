#include "globe/nnls.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "globe/interrupt.hpp"
#include "globe/parallel.hpp"
#include "nnls_solver.hpp"

namespace globe {
namespace {

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

void validate(const NnlsProblem& problem, const NnlsOptions& options) {
    require(problem.m >= 1, "m: found " + std::to_string(problem.m) + "; expected at least 1");
    require(problem.n >= 0, "n: found " + std::to_string(problem.n) + "; expected at least 0");
    require(problem.gram != nullptr, "gram: found a null pointer; expected m x m numbers");
    require(problem.correlations != nullptr || problem.n == 0,
            "correlations: found a null pointer; expected n x m numbers");
    require(problem.l1 >= 0.0 && std::isfinite(problem.l1),
            "l1: found " + std::to_string(problem.l1) + "; expected a finite number of at least 0");
    require(!problem.simplex || problem.l1 == 0.0,
            "l1: found " + std::to_string(problem.l1) + " with simplex; expected 0");
    require(options.tolerance > 0.0 && options.tolerance < 1.0,
            "tolerance: found " + std::to_string(options.tolerance) + "; expected a number between 0 and 1");
    require(options.max_iterations >= 0,
            "max_iterations: found " + std::to_string(options.max_iterations) + "; expected at least 0");
    require(options.max_support >= 0,
            "max_support: found " + std::to_string(options.max_support) + "; expected at least 0");
}

}  // namespace

void nnls(const NnlsProblem& problem, const NnlsOptions& options, const NnlsResult& result, int threads) {
    validate(problem, options);
    const std::int64_t workers = resolve_threads(threads);
    const std::int64_t grain = std::clamp<std::int64_t>(problem.n / (8 * workers), 1, 256);
    parallel_for((problem.n + grain - 1) / grain, threads, [&](std::int64_t task) {
        nnls_rows(problem, options, result, task * grain, std::min(problem.n, (task + 1) * grain));
    });
}

void nnls_rows(const NnlsProblem& problem, const NnlsOptions& options, const NnlsResult& result,
               std::int64_t begin, std::int64_t end) {
    validate(problem, options);
    require(0 <= begin && begin <= end && end <= problem.n,
            "begin, end: found " + std::to_string(begin) + ", " + std::to_string(end) +
                "; expected a range of the " + std::to_string(problem.n) + " rows");
    if (begin == end) return;
    detail::NnlsSolver solver(problem, options);
    for (std::int64_t row = begin; row < end; ++row) {
        check_interrupt();
        solver.solve(row, result);
    }
}

}  // namespace globe
