#include "nnls_scale.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace globe::detail {
namespace {

constexpr int farthest = 1000;  // exponent of the largest weight, so that weights stay finite
constexpr int near = 64;        // exponents of a diagonal that may stay as it is
constexpr int deepest_lift = 40;
constexpr int polish_beyond = 10;  // exponent of a weight from which the lift costs too many digits
constexpr double huge = 1e100;     // what is scaled is of size 1, but for a Gram matrix that is none

}  // namespace

NnlsScaled::NnlsScaled(const NnlsProblem& problem)
    : m(problem.m), simplex(problem.simplex), l1_(problem.l1), given_(problem.gram) {
    const auto size = static_cast<std::size_t>(m);
    for (auto* vector : {&weights, &inverse_weights, &norms, &factors_, &half_squares_}) vector->resize(size);
    exponents_.resize(size);
    std::vector<double> slack(size);  // half a denormal, whose product bounds the rounding of the smallest

    double most = 0.0;
    for (std::int64_t j = 0; j < m; ++j) most = std::max(most, problem.gram[j * (m + 1)]);
    int most_power = 1, power = 0;
    const double most_fraction = std::frexp(most, &most_power);
    const auto half_down = [](int number) { return (number - (number & 1)) / 2; };
    unit_ = std::abs(most_power) > near ? -half_down(most_power - 1) : 0;
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
    unit_factor_ = std::ldexp(1.0, unit_);
    farthest_weight_ = std::ldexp(1.0, spread);
    if (unit_ != 0 || spread > 0) scale_gram();
    const double* diagonal = gram(false).data;
    for (std::int64_t j = 0; j < m; ++j, diagonal += m + 1) {
        norms[j] = *diagonal > 0.0 ? std::sqrt(*diagonal) : 0.0;
        largest = std::max(largest, *diagonal);
    }
    for (std::int64_t j = 0; j < m; ++j) {
        const double norm = norms[j] * inverse_weights[j];
        half_squares_[j] = 0.5 * (norm * norm);
    }
    find_curvature(slack);
    if (!simplex) return;
    lift = std::ldexp(largest > 0.0 ? largest : 1.0, -std::min(spread, deepest_lift));
    polished = spread > polish_beyond;
}

void NnlsScaled::scale_gram() {
    scaled_.reset(new double[static_cast<std::size_t>(m * m)]);
    const double* factors = factors_.data();
    for (std::int64_t i = 0; i < m; ++i) {
        const double *from = given_ + i * m, factor = factors_[i];
        double* to = scaled_.get() + i * m;
        for (std::int64_t j = 0; j < m; ++j) {
            const double entry = from[j] * factor * factors[j];
            to[j] = entry > huge ? huge : entry < -huge ? -huge : entry;
        }
    }
}

void NnlsScaled::find_curvature(const std::vector<double>& slack) {
    const double *sizes = norms.data(), *roundings = slack.data();
    for (std::int64_t i = 0; i < m; ++i) {
        const double *row = gram(false).data + i * m, norm = nnls_convex * norms[i], rounding = slack[i];
        double excess = 0.0;
        for (std::int64_t j = 0; j < i; ++j) {
            const double beyond = std::fabs(row[j]) - (norm * sizes[j] + rounding * roundings[j]);
            excess = beyond > excess ? beyond : excess;
        }
        indefinite = indefinite || excess > 0.0;
    }
}

NnlsScaled::Row NnlsScaled::scale(const double* correlations, double* c) const {
    if (simplex) return scale_simplex(correlations, c);
    Row row;
    const double size = distance(correlations, l1_);
    for (std::int64_t j = 0; j < m; ++j) c[j] = (correlations[j] - l1_) * factors_[j];
    row.size = size * unit_factor_;
    if (size == 0.0 || (1.0 / huge < row.size && row.size * farthest_weight_ < huge)) return row;
    return scale_extreme(correlations, c);
}

// The largest difference between the right-hand side and a number. Chains of maxima hide each other's
// latency.
double NnlsScaled::distance(const double* correlations, double from) const {
    double most[4] = {};
    const auto see = [&](std::int64_t chain, std::int64_t j) {
        const double size = std::fabs(correlations[j] - from);
        most[chain] = size > most[chain] ? size : most[chain];
    };
    std::int64_t j = 0;
    for (; j + 4 <= m; j += 4) {
        for (std::int64_t chain = 0; chain < 4; ++chain) see(chain, j + chain);
    }
    for (; j < m; ++j) see(0, j);
    return std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
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
    row.size = distance(correlations, 0.0) * unit_factor_ * unit_factor_;
    row.overflow = !(row.size <= huge);
    const auto side = [&](std::int64_t j) { return correlations[j] * unit_factor_ * unit_factor_; };
    const auto bounded = [&](std::int64_t j) { return std::min(std::max(side(j), -huge), huge); };
    double best = std::numeric_limits<double>::infinity();
    for (std::int64_t j = 0; j < m; ++j) {
        c[j] = row.overflow ? bounded(j) : side(j);
        const double value = half_squares_[j] - c[j];
        if (value < best) {
            best = value;
            row.vertex = j;
        }
    }
    row.size = std::min(row.size, huge);
    // The multiplier of sum(a) = 1 absorbs any constant in c; taking it out first avoids cancellation.
    const double constant = c[row.vertex];
    for (std::int64_t j = 0; j < m; ++j) {
        const double rest = (c[j] - constant) * weights[j];
        c[j] = rest < -huge * huge ? -huge * huge : rest;
    }
    return row;
}

double NnlsScaled::code(std::int64_t atom, double value, const Row& row) const {
    if (simplex) return value * weights[atom];
    if (row.exponent == 0) return value * factors_[atom];
    return std::ldexp(value, exponents_[atom] + row.exponent);
}

}  // namespace globe::detail
