// Checks the optimality conditions of nnls, which determine the solution, on easy and on hostile problems.
#include "globe/nnls.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

using globe::NnlsStatus;
using globe::tests::check;

struct Data {
    std::int64_t m, n;
    std::vector<double> gram, correlations;

    globe::NnlsProblem problem(double l1 = 0.0, bool simplex = false) const {
        return {gram.data(), correlations.data(), m, n, l1, simplex};
    }
};

struct Solution {
    std::vector<double> codes, residual, scaled;
    std::vector<NnlsStatus> status;
    std::vector<std::int64_t> iterations;

    explicit Solution(const Data& data)
        : codes(data.n * data.m), residual(data.n), scaled(data.n), status(data.n), iterations(data.n) {}
    globe::NnlsResult result() {
        return {codes.data(), status.data(), iterations.data(), residual.data(), scaled.data()};
    }
};

Solution solve(const Data& data, const globe::NnlsProblem& problem, const globe::NnlsOptions& options = {},
               int threads = 1) {
    Solution found(data);
    globe::nnls(problem, options, found.result(), threads);
    return found;
}

// Gaussian atoms of k entries, the last `copies` of them equal to the first ones.
Data random_data(std::int64_t m, std::int64_t k, std::int64_t n, std::int64_t copies = 0) {
    std::mt19937 random(static_cast<unsigned>(m * 1000 + k));
    std::normal_distribution<double> normal;
    std::vector<double> atoms(m * k), targets(n * k);
    for (auto& entry : atoms) entry = normal(random);
    for (auto& entry : targets) entry = normal(random);
    std::copy(atoms.begin(), atoms.begin() + copies * k, atoms.end() - copies * k);
    Data data{m, n, std::vector<double>(m * m), std::vector<double>(n * m)};
    const auto product = [k](const double* a, const double* b) {
        double sum = 0.0;
        for (std::int64_t t = 0; t < k; ++t) sum += a[t] * b[t];
        return sum;
    };
    for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = 0; j < m; ++j) data.gram[i * m + j] = product(&atoms[i * k], &atoms[j * k]);
    }
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < m; ++j) {
            data.correlations[i * m + j] = product(&targets[i * k], &atoms[j * k]);
        }
    }
    return data;
}

// Largest violation of the optimality conditions of one row, as nnls.hpp defines it.
double violation(const Data& data, const globe::NnlsProblem& problem, const double* c, const double* x) {
    double size = 0.0, largest_c = 0.0, largest_gram = 0.0, multiplier = 0.0, worst = 0.0;
    std::vector<double> w(data.m);
    for (std::int64_t i = 0; i < data.m; ++i) {
        w[i] = c[i] - problem.l1;
        for (std::int64_t j = 0; j < data.m; ++j) w[i] -= data.gram[i * data.m + j] * x[j];
        size += x[i];
        largest_c = std::max(largest_c, std::fabs(c[i] - problem.l1));
        largest_gram = std::max(largest_gram, data.gram[i * (data.m + 1)]);
        multiplier += problem.simplex ? w[i] * x[i] : 0.0;
    }
    for (std::int64_t i = 0; i < data.m; ++i) {
        worst = std::max(worst, x[i] > 0.0 ? std::fabs(w[i] - multiplier) : w[i] - multiplier);
    }
    return worst / std::max(largest_c + largest_gram * size, 1e-300);
}

void check_optimal(const Data& data, const globe::NnlsProblem& problem, const Solution& found,
                   const std::string& what) {
    for (std::int64_t row = 0; row < data.n; ++row) {
        const double* x = &found.codes[row * data.m];
        double sum = 0.0;
        bool positive = true;
        for (std::int64_t j = 0; j < data.m; ++j) {
            sum += x[j];
            positive = positive && x[j] >= 0.0;
        }
        const std::string where = what + ", row " + std::to_string(row);
        check(positive, where + ": negative code");
        check(!problem.simplex || std::fabs(sum - 1.0) < 1e-12, where + ": sum " + std::to_string(sum));
        check(found.status[row] == NnlsStatus::optimal, where + ": status");
        check(found.residual[row] <= 1e-10 && found.scaled[row] <= 1e-10, where + ": residual");
        check(violation(data, problem, &data.correlations[row * data.m], x) <= 1e-10, where + ": conditions");
    }
}

void solves(std::int64_t m, std::int64_t k, std::int64_t copies) {
    const Data data = random_data(m, k, 6, copies);
    const std::string what = "m = " + std::to_string(m) + ", k = " + std::to_string(k);
    for (const double l1 : {0.0, 1.0}) {
        check_optimal(data, data.problem(l1), solve(data, data.problem(l1)), what);
    }
    check_optimal(data, data.problem(0.0, true), solve(data, data.problem(0.0, true)), what + ", simplex");
}

bool same(const Solution& a, const Solution& b) {
    return a.codes == b.codes && a.residual == b.residual && a.status == b.status &&
           a.iterations == b.iterations;
}

void threads_and_ranges_change_nothing() {
    const Data data = random_data(40, 60, 50);
    for (const bool simplex : {false, true}) {
        const auto problem = data.problem(0.0, simplex);
        const Solution one = solve(data, problem);
        check(same(one, solve(data, problem, {}, 3)), "threads");
        Solution parts(data);
        globe::nnls_rows(problem, {}, parts.result(), 0, 7);
        globe::nnls_rows(problem, {}, parts.result(), 7, 50);
        check(same(one, parts), "ranges of rows");
    }
}

void warm_starts_end_at_the_solution() {
    const Data data = random_data(30, 45, 20);
    const Solution cold = solve(data, data.problem());
    const auto warm = std::make_unique<bool[]>(data.n * data.m);
    globe::NnlsOptions options;
    options.warm_start = warm.get();
    for (const int kind : {0, 1, 2, 3}) {
        for (std::int64_t i = 0; i < data.n * data.m; ++i) {
            warm[i] = kind == 0 ? cold.codes[i] > 0.0 : kind == 1 ? cold.codes[i] == 0.0 : kind == 2;
        }
        const Solution found = solve(data, data.problem(), options);
        check_optimal(data, data.problem(), found, "warm start");
        if (kind > 0) continue;
        for (const auto count : found.iterations) check(count == 1, "a right guess needs one system");
    }
}

void bounds_the_support() {
    const Data data = random_data(30, 45, 20);
    globe::NnlsOptions options;
    for (const bool simplex : {false, true}) {
        for (options.max_support = 1; options.max_support < 8; ++options.max_support) {
            const Solution found = solve(data, data.problem(0.0, simplex), options);
            for (std::int64_t row = 0; row < data.n; ++row) {
                const double* x = &found.codes[row * data.m];
                const auto size = std::count_if(x, x + data.m, [](double value) { return value > 0.0; });
                check(size <= options.max_support, "support");
                check(found.status[row] == NnlsStatus::optimal ||
                          (found.status[row] == NnlsStatus::support_limit && size == options.max_support),
                      "status with a bounded support");
                check(found.residual[row] <= 1e-10, "residual with a bounded support");
            }
        }
    }
}

// Exchanging all infeasible atoms at once goes round in a circle of three supports for ever on each of these
// blocks (Curtis, Han and Robinson, "A globally convergent primal-dual active-set framework for large-scale
// convex quadratic optimization", Comput. Optim. Appl. 60, 2015).
void does_not_cycle(std::int64_t blocks) {
    const double block[3][3] = {{4, 5, -5}, {5, 9, -5}, {-5, -5, 7}}, side[3] = {-2, -1, 3};
    Data data{3 * blocks, 1, std::vector<double>(9 * blocks * blocks), std::vector<double>(3 * blocks)};
    for (std::int64_t i = 0; i < data.m; ++i) {
        data.correlations[i] = side[i % 3];
        for (std::int64_t j = 0; j < 3; ++j) data.gram[i * data.m + i / 3 * 3 + j] = block[i % 3][j];
    }
    check_optimal(data, data.problem(), solve(data, data.problem()), "cycling family");
    const auto warm = std::make_unique<bool[]>(data.m);
    for (std::int64_t i = 0; i < data.m; ++i) warm[i] = i % 3 == 2;
    globe::NnlsOptions options;
    options.warm_start = warm.get();
    check_optimal(data, data.problem(), solve(data, data.problem(), options), "cycling family, warm");
}

void reports_what_it_cannot_solve() {
    // No minimum: c has a part outside the range of the Gram matrix.
    const Data unbounded{2, 1, {1.0, 1.0, 1.0, 1.0}, {1.0, 2.0}};
    const auto status = solve(unbounded, unbounded.problem()).status[0];
    check(status == NnlsStatus::singular || status == NnlsStatus::optimal, "unbounded");
    const Data data = random_data(20, 30, 5);
    globe::NnlsOptions once;
    once.max_iterations = 1;
    const Solution stopped = solve(data, data.problem(), once);
    check(std::count(stopped.status.begin(), stopped.status.end(), NnlsStatus::not_converged) > 0, "limit");
    Data broken = data;
    broken.gram[25] = broken.correlations[3] = std::numeric_limits<double>::quiet_NaN();
    solve(broken, broken.problem());
    solve(broken, broken.problem(0.0, true));
}

void does_not_depend_on_scale() {
    Data graded{11, 1, std::vector<double>(121), std::vector<double>(11)};
    for (std::int64_t j = 0; j < 11; ++j) {
        graded.gram[j * 12] = graded.correlations[j] = std::pow(10.0, -static_cast<double>(j));
    }
    const Solution ones = solve(graded, graded.problem());
    check(ones.status[0] == NnlsStatus::optimal, "graded: status");
    for (const double x : ones.codes) check(std::fabs(x - 1.0) < 1e-14, "graded: code");
    const auto status = [](std::vector<double> gram, std::vector<double> correlations, bool simplex) {
        const Data data{2, 1, std::move(gram), std::move(correlations)};
        const Solution found = solve(data, data.problem(0.0, simplex));
        for (const double x : found.codes) check(x >= 0.0 && std::isfinite(x), "codes are numbers");
        return found.status[0];
    };
    check(status({1e-200, 0, 0, 1e-200}, {1e200, 5e199}, false) == NnlsStatus::overflow, "overflow");
    check(status({2e307, 1e307, 1e307, 2e307}, {3e307, 3e307}, true) == NnlsStatus::optimal, "1e307");
    check(status({2e-310, 1e-310, 1e-310, 2e-310}, {3e-310, 3e-310}, false) == NnlsStatus::optimal,
          "denormal");
    check(status({1, 2, 2, 1}, {1, 1}, false) == NnlsStatus::indefinite, "indefinite");
    check(status({1, 0, 0, -0.0}, {1, 1}, false) == NnlsStatus::singular, "negative zero");
    globe::nnls({nullptr, nullptr, 0, 0}, {}, {});
}

void refuses() {
    const Data data = random_data(4, 6, 2);
    Solution found(data);
    const auto refused = [&](const std::string& argument, auto change) {
        globe::NnlsProblem problem = data.problem();
        globe::NnlsOptions options;
        change(problem, options);
        globe::tests::check_refused(argument, [&] { globe::nnls(problem, options, found.result()); });
    };
    refused("m", [](auto& problem, auto&) { problem.m = -1; });
    refused("n", [](auto& problem, auto&) { problem.n = -1; });
    refused("gram", [](auto& problem, auto&) { problem.gram = nullptr; });
    refused("correlations", [](auto& problem, auto&) { problem.correlations = nullptr; });
    refused("l1", [](auto& problem, auto&) { problem.l1 = -1.0; });
    refused("l1", [](auto& problem, auto&) { problem.l1 = std::numeric_limits<double>::infinity(); });
    refused("l1", [](auto& problem, auto&) { problem.l1 = 1.0, problem.simplex = true; });
    refused("tolerance", [](auto&, auto& options) { options.tolerance = 0.0; });
    refused("tolerance", [](auto&, auto& options) { options.tolerance = std::nan(""); });
    refused("max_iterations", [](auto&, auto& options) { options.max_iterations = -1; });
    refused("max_support", [](auto&, auto& options) { options.max_support = -1; });
    globe::tests::check_refused("begin, end",
                                [&] { globe::nnls_rows(data.problem(), {}, found.result(), 0, 3); });
}

void everything() {
    for (const std::int64_t m : {1, 2, 7, 8, 9, 16, 31, 64, 100, 133}) {
        solves(m, m + m / 2 + 1, 0);
        solves(m, std::max<std::int64_t>(1, m / 3), 0);  // a singular Gram matrix
        solves(m, 2 * m, m / 2);                         // atoms that occur twice
    }
    threads_and_ranges_change_nothing();
    warm_starts_end_at_the_solution();
    bounds_the_support();
    for (const std::int64_t blocks : {1, 2, 3, 10, 40}) does_not_cycle(blocks);
    reports_what_it_cannot_solve();
    does_not_depend_on_scale();
    refuses();
}

}  // namespace

int main() {
    globe::tests::on_every_isa(everything);
    return globe::tests::result();
}
