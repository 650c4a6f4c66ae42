#include "nnls_support.hpp"

#include <algorithm>

namespace globe::detail {
namespace {

// A multiple of every vector's width: vectors may be read and written whole.
constexpr std::size_t block = 8;

constexpr std::size_t round_down(std::size_t count) {
    return count / block * block;
}

}  // namespace

NnlsSupport::NnlsSupport(const NnlsScaled& scaled)
    : scaled_(scaled), loops_(variant().nnls), gram_(scaled.gram(true)) {
    const std::int64_t m = scaled.m;
    const std::size_t padded = round_down(static_cast<std::size_t>(m) + 2 * block - 1);
    atoms_.reserve(padded);
    for (auto* vector : {&values_, &side_, &ones_side_, &ones_, &scratch_}) vector->resize(padded);
    factor_memory_.reset(
        new double[padded * (padded + block) / 2 + block]);  // too large to be worth clearing
    void* aligned = factor_memory_.get();
    std::size_t bytes = (padded * (padded + block) / 2 + block) * sizeof(double);
    factor_ = static_cast<double*>(std::align(block * sizeof(double), block, aligned, bytes));
}

void NnlsSupport::begin(const double* c) {
    c_ = c;
    multiplier_ = 0.0;
    concave_ = false;
    atoms_.clear();
    factored_ = solved_ = 0;
}

void NnlsSupport::add(std::int64_t atom, double value) {
    values_[atoms_.size()] = value;
    atoms_.push_back(atom);
}

void NnlsSupport::remove(std::int64_t place) {
    std::copy(values_.begin() + place + 1, values_.begin() + size(), values_.begin() + place);
    atoms_.erase(atoms_.begin() + place);
    forget_from(static_cast<std::size_t>(place));
}

void NnlsSupport::normalise() {
    if (!scaled_.simplex) return;
    double sum = 0.0;
    for (std::size_t k = 0; k < atoms_.size(); ++k) sum += scaled_.weights[atoms_[k]] * values_[k];
    for (std::size_t k = 0; k < atoms_.size(); ++k) values_[k] /= sum;
}

std::int64_t NnlsSupport::minimise(double* minimum) {
    const std::int64_t independent = loops_.extend(gram_, atoms_.data(), size(),
                                                   static_cast<std::int64_t>(round_down(factored_)), factor_);
    factored_ = static_cast<std::size_t>(independent);
    if (independent < size()) {
        examine(independent);
        return independent;
    }
    const std::size_t known = round_down(solved_);
    const std::size_t count = atoms_.size(), padded = round_down(count + block - 1);
    for (std::size_t k = known; k < padded; ++k) side_[k] = k < count ? c_[atoms_[k]] : 0.0;
    if (scaled_.simplex) {
        for (std::size_t k = known; k < padded; ++k) {
            ones_side_[k] = k < count ? scaled_.weights[atoms_[k]] : 0.0;
        }
    }
    solved_ = count;
    solve(side_.data(), minimum, known);
    if (scaled_.simplex) solve_on_simplex(minimum, known);
    return size();
}

// Of the atom at that place, which depends on those before it.
void NnlsSupport::examine(std::int64_t place) {
    const std::int64_t atom = atoms_[place];
    std::fill(scratch_.begin(), scratch_.end(), 0.0);
    for (std::int64_t k = 0; k < place; ++k) scratch_[k] = lifted(atom, atoms_[k]);
    loops_.forward(factor_, place, 0, scratch_.data());
    double curvature = lifted(atom, atom);
    const double least = (1.0 - nnls_convex) * curvature;
    for (std::int64_t k = 0; k < place; ++k) curvature -= scratch_[k] * scratch_[k];
    concave_ = concave_ || curvature < least;
}

// From the minimum without the sum to the one with it: the multiplier lets the sum be one.
void NnlsSupport::solve_on_simplex(double* minimum, std::size_t known) {
    solve(ones_side_.data(), ones_.data(), known);
    double sum = 0.0, ones = 0.0;
    for (std::size_t k = 0; k < atoms_.size(); ++k) {
        sum += scaled_.weights[atoms_[k]] * minimum[k];
        ones += scaled_.weights[atoms_[k]] * ones_[k];
    }
    const double shift = (1.0 - sum) / ones;
    for (std::size_t k = 0; k < atoms_.size(); ++k) minimum[k] += shift * ones_[k];
    multiplier_ = shift - scaled_.lift;
    if (scaled_.polished) {
        correct(minimum);
        correct(minimum);
    }
}

// One step of refinement, with residuals that know nothing of the lift.
void NnlsSupport::correct(double* minimum) {
    const std::size_t count = atoms_.size();
    double missing = 1.0, sum = 0.0, ones = 0.0;
    std::fill(scratch_.begin(), scratch_.end(), 0.0);
    for (std::size_t k = 0; k < count; ++k) {
        const double* row = gram_.data + atoms_[k] * gram_.size;
        const double weight = scaled_.weights[atoms_[k]];
        double rest = c_[atoms_[k]] + multiplier_ * weight;
        for (std::size_t l = 0; l < count; ++l) rest -= row[atoms_[l]] * minimum[l];
        scratch_[k] = rest;
        missing -= weight * minimum[k];
    }
    solve(scratch_.data(), scratch_.data(), 0);
    for (std::size_t k = 0; k < count; ++k) {
        sum += scaled_.weights[atoms_[k]] * scratch_[k];
        ones += scaled_.weights[atoms_[k]] * ones_[k];
    }
    const double shift = (missing - sum) / ones;
    for (std::size_t k = 0; k < count; ++k) minimum[k] += scratch_[k] + shift * ones_[k];
    multiplier_ += shift - scaled_.lift * missing;
}

void NnlsSupport::solve(double* side, double* solution, std::size_t known) const {
    loops_.forward(factor_, size(), static_cast<std::int64_t>(known), side);
    loops_.backward(factor_, size(), side, solution);
}

void NnlsSupport::express(std::int64_t atom, double* coefficients) const {
    std::fill(coefficients, coefficients + room(), 0.0);
    for (std::size_t k = 0; k < atoms_.size(); ++k) coefficients[k] = lifted(atom, atoms_[k]);
    solve(coefficients, coefficients, 0);
}

void NnlsSupport::gradient(double* w) const {
    const double multiplier = atoms_.empty() ? 0.0 : multiplier_;
    loops_.gradient(gram_, atoms_.data(), size(), values_.data(), c_, multiplier, w);
}

}  // namespace globe::detail
