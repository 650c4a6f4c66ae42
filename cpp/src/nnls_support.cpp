#include "nnls_support.hpp"

#include <algorithm>

namespace globe::detail {
namespace {

// A multiple of every vector's width: vectors may be read and written whole.
constexpr std::size_t block = 8;

constexpr std::size_t round_down(std::size_t count) {
    return count / block * block;
}

double largest_on_diagonal(const double* gram, std::int64_t m) {
    double largest = 0.0;
    for (std::int64_t j = 0; j < m; ++j) largest = std::max(largest, gram[j * (m + 1)]);
    return largest;
}

}  // namespace

NnlsSupport::NnlsSupport(const double* gram, std::int64_t m, bool simplex)
    : loops_(variant().nnls), gram_{gram, m, 0.0}, simplex_(simplex) {
    // Where the values sum to one, 1/2 xᵀ (s 11ᵀ) x is constant: adding s to the Gram matrix leaves the
    // problem as it is and makes the matrix definite wherever the solution is unique. Not a ridge.
    if (simplex) {
        const double largest = largest_on_diagonal(gram, m);
        gram_.shift = largest > 0.0 ? largest : 1.0;
    }
    const std::size_t padded = round_down(static_cast<std::size_t>(m) + 2 * block - 1);
    atoms_.reserve(padded);
    for (auto* vector : {&values_, &side_, &ones_side_, &ones_}) vector->resize(padded);
    factor_memory_.reset(
        new double[padded * (padded + block) / 2 + block]);  // too large to be worth clearing
    void* aligned = factor_memory_.get();
    std::size_t bytes = (padded * (padded + block) / 2 + block) * sizeof(double);
    factor_ = static_cast<double*>(std::align(block * sizeof(double), block, aligned, bytes));
}

void NnlsSupport::begin(const double* c) {
    c_ = c;
    multiplier_ = 0.0;
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
    if (!simplex_) return;
    double sum = 0.0;
    for (std::size_t k = 0; k < atoms_.size(); ++k) sum += values_[k];
    for (std::size_t k = 0; k < atoms_.size(); ++k) values_[k] /= sum;
}

std::int64_t NnlsSupport::minimise(double* minimum) {
    const std::int64_t independent = loops_.extend(gram_, atoms_.data(), size(),
                                                   static_cast<std::int64_t>(round_down(factored_)), factor_);
    factored_ = static_cast<std::size_t>(independent);
    if (independent < size()) return independent;
    const std::size_t known = round_down(solved_);
    const std::size_t count = atoms_.size(), padded = round_down(count + block - 1);
    for (std::size_t k = known; k < padded; ++k) {
        side_[k] = k < count ? c_[atoms_[k]] : 0.0;
        ones_side_[k] = k < count ? 1.0 : 0.0;
    }
    solved_ = count;
    solve(side_.data(), minimum, known);
    if (simplex_) {
        solve(ones_side_.data(), ones_.data(), known);
        double sum = 0.0, ones = 0.0;
        for (std::size_t k = 0; k < count; ++k) {
            sum += minimum[k];
            ones += ones_[k];
        }
        multiplier_ = (1.0 - sum) / ones;
        for (std::size_t k = 0; k < count; ++k) minimum[k] += multiplier_ * ones_[k];
    }
    return size();
}

void NnlsSupport::solve(double* side, double* solution, std::size_t known) const {
    loops_.forward(factor_, size(), static_cast<std::int64_t>(known), side);
    loops_.backward(factor_, size(), side, solution);
}

void NnlsSupport::express(std::int64_t atom, double* coefficients) const {
    std::fill(coefficients, coefficients + room(), 0.0);
    const double* row = gram_.data + atom * gram_.size;
    for (std::size_t k = 0; k < atoms_.size(); ++k) coefficients[k] = row[atoms_[k]] + gram_.shift;
    solve(coefficients, coefficients, 0);
}

void NnlsSupport::gradient(double* w) const {
    double sum = 0.0;
    for (std::size_t k = 0; k < atoms_.size(); ++k) sum += values_[k];
    const double constant = (atoms_.empty() ? 0.0 : multiplier_) - gram_.shift * sum;
    loops_.gradient(gram_, atoms_.data(), size(), values_.data(), c_, constant, w);
}

}  // namespace globe::detail
