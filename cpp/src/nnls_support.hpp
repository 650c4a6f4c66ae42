// The atoms in use by a row of nnls, in the order they entered, with their values.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "nnls_scale.hpp"
#include "variant.hpp"

namespace globe::detail {

class NnlsSupport {
  public:
    // Keeps a reference. On the simplex the values, times the weights, sum to one.
    explicit NnlsSupport(const NnlsScaled& scaled);

    // Takes all atoms out; c, which stays with the caller, is the right-hand side from now on.
    void begin(const double* c);

    std::int64_t size() const { return static_cast<std::int64_t>(atoms_.size()); }
    std::int64_t atom(std::int64_t place) const { return atoms_[static_cast<std::size_t>(place)]; }
    const double* values() const { return values_.data(); }

    void add(std::int64_t atom, double value = 0.0);
    void remove(std::int64_t place);

    // Sets the value at every place to value_of(place) and takes out the atoms where that is not positive.
    template <class ValueOf>
    void revise(const ValueOf& value_of) {
        std::size_t left = 0;
        for (std::size_t place = 0; place < atoms_.size(); ++place) {
            const double value = value_of(static_cast<std::int64_t>(place));
            if (value > 0.0) {
                atoms_[left] = atoms_[place];
                values_[left++] = value;
            } else {
                forget_from(left);
            }
        }
        atoms_.resize(left);
    }

    // On the simplex, divides the values by their weighted sum.
    void normalise();

    // Finds the values that minimise the objective without regard to signs; `minimum` holds room() numbers
    // and may be the values themselves. Returns size(), or, having found nothing, the place of the first atom
    // that depends on those before it, to rounding.
    std::int64_t minimise(double* minimum);
    std::int64_t minimise() { return minimise(values_.data()); }

    // The atom as a combination of those in use, which minimise has found independent, in the least squares
    // sense; `coefficients` holds room() numbers.
    void express(std::int64_t atom, double* coefficients) const;

    // w = c - G x; on the simplex less the multiplier of the last minimum.
    void gradient(double* w) const;

    // Whether minimise has met negative curvature since begin.
    bool concave() const { return concave_; }

    std::size_t room() const { return values_.size(); }

  private:
    void forget_from(std::size_t place) {
        if (place < factored_) factored_ = place;
        if (place < solved_) solved_ = place;
    }
    void solve(double* side, double* solution, std::size_t known) const;
    void solve_on_simplex(double* minimum, std::size_t known);
    void correct(double* minimum);
    void examine(std::int64_t place);

    const NnlsScaled& scaled_;
    const NnlsLoops& loops_;
    const NnlsGram gram_;
    double lifted(std::int64_t i, std::int64_t j) const {
        return gram_.data[i * gram_.size + j] + gram_.lift * gram_.weights[i] * gram_.weights[j];
    }
    bool concave_ = false;
    const double* c_ = nullptr;
    double multiplier_ = 0.0;
    std::vector<std::int64_t> atoms_;
    std::vector<double> values_;            // by place
    std::vector<double> side_, ones_side_;  // right-hand sides, solved forwards
    std::vector<double> ones_;              // G_PP^-1 q
    std::vector<double> scratch_;           // by place
    std::unique_ptr<double[]> factor_memory_;
    double* factor_;
    std::size_t factored_ = 0, solved_ = 0;  // places that the factor and the sides cover
};

}  // namespace globe::detail
