#include "nnls_scale.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace globe::detail {
namespace {

constexpr int farthest = 1000;  // exponent of the largest weight, so that weights stay finite
constexpr int deepest_lift = 40;
constexpr int polish_beyond = 10;  // exponent of a weight from which the lift costs too many digits
constexpr double huge = 1e100;     // what is scaled is of size 1, but for a Gram matrix that is none

}  // namespace

NnlsScaled::NnlsScaled(const NnlsProblem& problem) : m(problem.m), simplex(problem.simplex), l1_(problem.l1) {
    const auto size = static_cast<std::size_t>(m);
    for (auto* vector : {&weights, &inverse_weights, &norms, &factors_}) vector->resize(size);
    exponents_.resize(size);
    gram_.resize(size * size);
    std::vector<double> slack(size);  // half a denormal, whose product bounds the rounding of the smallest

    double most = 0.0;
    for (std::int64_t j = 0; j < m; ++j) most = std::max(most, problem.gram[j * (m + 1)]);
    int most_power = 1, power = 0;
    const double most_fraction = std::frexp(most, &most_power);
    const auto half_down = [](int number) { return (number - (number & 1)) / 2; };
    unit_ = most > 0.0 ? -half_down(most_power - 1) : 0;
    int spread = 0;
    for (std::int64_t j = 0; j < m; ++j) {
        int farther = 0;
        if (const double diagonal = problem.gram[j * (m + 1)]; diagonal > 0.0) {
            const double fraction = std::frexp(diagonal, &power);
            farther = std::min(farthest, half_down(most_power - power - (most_fraction < fraction ? 1 : 0)));
        }
        spread = std::max(spread, farther);
        exponents_[j] = unit_ + farther;
        factors_[j] = std::ldexp(1.0, exponents_[j]);
        weights[j] = std::ldexp(1.0, farther);
        inverse_weights[j] = std::ldexp(1.0, -farther);
        slack[j] = std::ldexp(1.0, exponents_[j] - 535);
    }
    for (std::int64_t i = 0; i < m; ++i) {
        const double* from = problem.gram + i * m;
        double* to = gram_.data() + i * m;
        const double factor = factors_[i];
        for (std::int64_t j = 0; j < m; ++j) {
            const double entry = from[j] * factor * factors_[j];
            to[j] = std::min(std::max(entry, -huge), huge);
        }
        norms[i] = to[i] > 0.0 ? std::sqrt(to[i]) : 0.0;
        largest = std::max(largest, to[i]);
    }
    for (std::int64_t i = 0; i < m; ++i) {
        const double* row = gram_.data() + i * m;
        const double norm = nnls_convex * norms[i], rounding = slack[i];
        int beyond = 0;
        for (std::int64_t j = 0; j < m; ++j) {
            beyond |= std::fabs(row[j]) > norm * norms[j] + rounding * slack[j];
        }
        indefinite = indefinite || beyond != 0;
    }
    if (!simplex) return;
    lift = std::ldexp(largest > 0.0 ? largest : 1.0, -std::min(spread, deepest_lift));
    polished = spread > polish_beyond;
    lifted_.resize(size * size);
    for (std::int64_t i = 0; i < m; ++i) {
        const double weight = lift * weights[i];
        for (std::int64_t j = 0; j < m; ++j) lifted_[i * m + j] = gram_[i * m + j] + weight * weights[j];
    }
}

NnlsScaled::Row NnlsScaled::scale(const double* correlations, double* c) const {
    if (simplex) return scale_simplex(correlations, c);
    Row row;
    double largest_c = 0.0;
    for (std::int64_t j = 0; j < m; ++j) {
        c[j] = (correlations[j] - l1_) * factors_[j];
        largest_c = std::max(largest_c, std::fabs(c[j]));
        row.size = std::max(row.size, std::fabs(c[j]) * inverse_weights[j]);
    }
    if (largest_c == 0.0 || (1.0 / huge < largest_c && largest_c < huge)) return row;
    return scale_extreme(correlations, c);
}

// Brings a right-hand side near one, whose largest entry is far from that or beyond the range.
NnlsScaled::Row NnlsScaled::scale_extreme(const double* correlations, double* c) const {
    Row row;
    bool halved = false;
    for (std::int64_t j = 0; j < m; ++j) halved = halved || !std::isfinite(correlations[j] - l1_);
    const auto side = [&](std::int64_t j) {
        return halved ? 0.5 * correlations[j] - 0.5 * l1_ : correlations[j] - l1_;
    };
    int most = std::numeric_limits<int>::min() / 2;
    for (std::int64_t j = 0; j < m; ++j) {
        if (side(j) == 0.0) continue;
        int power = 0;
        std::frexp(side(j), &power);
        most = std::max(most, power + exponents_[j]);
    }
    for (std::int64_t j = 0; j < m; ++j) {
        c[j] = std::ldexp(side(j), exponents_[j] - most);
        row.size = std::max(row.size, std::fabs(c[j]) * inverse_weights[j]);
    }
    row.exponent = most + (halved ? 1 : 0);
    return row;
}

NnlsScaled::Row NnlsScaled::scale_simplex(const double* correlations, double* c) const {
    Row row;
    const double unit = std::ldexp(1.0, unit_);
    double best = std::numeric_limits<double>::infinity();
    for (std::int64_t j = 0; j < m; ++j) {
        const double side = correlations[j] * unit * unit, norm = norms[j] * inverse_weights[j];
        row.size = std::max(row.size, std::fabs(side));
        c[j] = std::min(std::max(side, -huge), huge);
        const double value = 0.5 * (norm * norm) - c[j];
        if (value < best) {
            best = value;
            row.vertex = j;
        }
    }
    row.overflow = row.size > huge;
    row.size = std::min(row.size, huge);
    // The multiplier of sum(a) = 1 absorbs any constant in c; taking it out first avoids cancellation.
    const double constant = c[row.vertex];
    for (std::int64_t j = 0; j < m; ++j) c[j] = std::max((c[j] - constant) * weights[j], -huge * huge);
    return row;
}

double NnlsScaled::code(std::int64_t atom, double value, const Row& row) const {
    if (simplex) return value * weights[atom];
    if (row.exponent == 0) return value * factors_[atom];
    return std::ldexp(value, exponents_[atom] + row.exponent);
}

}  // namespace globe::detail
