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
    require(problem.m >= 0, "m: found " + std::to_string(problem.m) + "; expected at least 0");
    require(problem.n >= 0, "n: found " + std::to_string(problem.n) + "; expected at least 0");
    require(problem.gram != nullptr || problem.m == 0, "gram: found a null pointer; expected m x m numbers");
    require(problem.correlations != nullptr || problem.n == 0 || problem.m == 0,
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

void solve_rows(const NnlsProblem& problem, const detail::NnlsScaled& scaled, const NnlsOptions& options,
                const NnlsResult& result, std::int64_t begin, std::int64_t end) {
    detail::NnlsSolver solver(problem, scaled, options);
    for (std::int64_t row = begin; row < end; ++row) {
        check_interrupt();
        solver.solve(row, result);
    }
}

}  // namespace

void nnls(const NnlsProblem& problem, const NnlsOptions& options, const NnlsResult& result, int threads) {
    validate(problem, options);
    if (problem.n == 0 || problem.m == 0) return;
    const detail::NnlsScaled scaled(problem);
    const std::int64_t workers = resolve_threads(threads);
    const std::int64_t grain = std::clamp<std::int64_t>(problem.n / (8 * workers), 1, 256);
    parallel_for((problem.n + grain - 1) / grain, threads, [&](std::int64_t task) {
        solve_rows(problem, scaled, options, result, task * grain, std::min(problem.n, (task + 1) * grain));
    });
}

void nnls_rows(const NnlsProblem& problem, const NnlsOptions& options, const NnlsResult& result,
               std::int64_t begin, std::int64_t end) {
    validate(problem, options);
    require(0 <= begin && begin <= end && end <= problem.n,
            "begin, end: found " + std::to_string(begin) + ", " + std::to_string(end) +
                "; expected a range of the " + std::to_string(problem.n) + " rows");
    if (begin == end || problem.m == 0) return;
    solve_rows(problem, detail::NnlsScaled(problem), options, result, begin, end);
}

}  // namespace globe
