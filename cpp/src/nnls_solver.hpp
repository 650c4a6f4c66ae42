// Solves the rows of an nnls problem one after another.
#pragma once

#include <vector>

#include "globe/nnls.hpp"
#include "nnls_support.hpp"

namespace globe::detail {

class NnlsSolver {
  public:
    // Keeps references to both.
    NnlsSolver(const NnlsProblem& problem, const NnlsOptions& options);

    void solve(std::int64_t row, const NnlsResult& result);

  private:
    // Why an atom may not enter, whatever its gradient.
    enum class Bar : unsigned char { none, dependent, rounding };

    void begin(std::int64_t row);
    bool exchange_blocks();
    bool minimise_independent();
    void find_gradient();
    std::int64_t find_candidates();
    void enter_steepest(std::int64_t candidates, std::int64_t most);
    void move_single_atoms();
    bool settle();
    void exchange_dependent(std::int64_t atom);
    bool step_to_minimum();
    std::int64_t steepest_atom();
    void make_feasible();
    void write(std::int64_t row, const NnlsResult& result);
    double kkt_residual();
    NnlsStatus status_of(double residual) const;

    double diagonal(std::int64_t atom) const { return problem_.gram[atom * (problem_.m + 1)]; }
    double threshold() const { return 0.5 * options_.tolerance * (scale_ + largest_ * size_); }

    const NnlsProblem& problem_;
    const NnlsOptions& options_;
    const std::int64_t limit_;
    double largest_ = 0.0;  // on the diagonal of the Gram matrix
    NnlsSupport support_;

    // The row at hand.
    std::vector<double> c_, w_;  // right-hand side and gradient, by atom
    std::vector<Bar> bars_;      // by atom
    std::vector<double> minimum_;
    std::vector<double> steepness_;         // workspace
    std::vector<std::int64_t> candidates_;  // workspace
    std::int64_t vertex_ = 0;               // the best point with a single atom
    std::int64_t iterations_ = 0;
    double scale_ = 0.0;  // of c
    double size_ = 0.0;   // sum of |x|
    bool bounded_ = false;
};

}  // namespace globe::detail
