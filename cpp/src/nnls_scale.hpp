// The problem of nnls in variables of equal size.
//
// With gram[j, j] = |a_j|^2, the code of atom j is q_j y_j, where q_j is the power of two nearest to
// max |a| / |a_j| from below. The Gram matrix of y has a diagonal within a factor of four of its largest
// entry, which is brought near one where it is far from that. Powers of two round nothing.
#pragma once

#include <memory>
#include <vector>

#include "globe/nnls.hpp"
#include "variant.hpp"

namespace globe::detail {

// A factor by which negative curvature exceeds rounding.
constexpr double nnls_convex = 1.0 + 1e-6;

class NnlsScaled {
  public:
    explicit NnlsScaled(const NnlsProblem& problem);

    // With `lifted`, what is factored. Where codes sum to one, 1/2 aᵀ (s 11ᵀ) a is constant: adding s to the
    // Gram matrix leaves the problem as it is and makes the matrix definite wherever the solution is unique.
    // Not a ridge. s lies between the largest and the smallest entry of the diagonal, so that neither drowns
    // in the other.
    NnlsGram gram(bool lifted) const {
        return {scaled_ ? scaled_.get() : given_, m, lifted ? lift : 0.0, weights.data()};
    }

    // What a row is in scaled variables, beside its right-hand side.
    struct Row {
        double size = 0.0;        // largest |c - l1|, as the largest atom has it
        int exponent = 0;         // of the codes, besides the atoms' own
        std::int64_t vertex = 0;  // on the simplex, the best single atom; its right-hand side is zero
        bool overflow = false;    // on the simplex, c is too large beside the Gram matrix
    };
    Row scale(const double* correlations, double* c) const;

    // The code of an atom; infinite beyond the range.
    double code(std::int64_t atom, double value, const Row& row) const;

    std::int64_t m;
    bool simplex;
    std::vector<double> weights, inverse_weights;  // q, all at least 1, and 1 / q
    std::vector<double> norms;                     // roots of the scaled diagonal
    double largest = 0.0;                          // on the scaled diagonal
    double lift = 0.0;                             // s in scaled variables
    bool polished = false;                         // solutions of lifted systems are to be refined
    bool indefinite = false;  // an entry exceeds what the Cauchy-Schwarz inequality allows

  private:
    void scale_gram();
    void find_curvature(const std::vector<double>& slack);
    double distance(const double* correlations, double from) const;
    Row scale_extreme(const double* correlations, double* c) const;
    Row scale_simplex(const double* correlations, double* c) const;

    double l1_;
    int unit_ = 0;  // exponent of what multiplies the largest atom
    double unit_factor_ = 1.0, farthest_weight_ = 1.0;
    std::vector<int> exponents_;  // of what multiplies each atom: weights and unit
    std::vector<double> factors_, half_squares_;
    const double* given_;
    std::unique_ptr<double[]> scaled_;  // null where the given matrix is as good
};

}  // namespace globe::detail
