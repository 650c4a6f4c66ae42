// Solves the rows of an nnls problem one after another.
#pragma once

#include <vector>

#include "globe/nnls.hpp"
#include "nnls_scale.hpp"
#include "nnls_support.hpp"

namespace globe::detail {

class NnlsSolver {
  public:
    // Keeps references to all.
    NnlsSolver(const NnlsProblem& problem, const NnlsScaled& scaled, const NnlsOptions& options);

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
    struct Residuals {
        double kkt = 0.0, scaled = 0.0;
    };
    Residuals residuals();
    NnlsStatus status_of(const Residuals& found, bool overflow) const;
    void start_at_vertex();
    void measure_values();

    // What the gradient at an atom is relative to; see nnls.hpp.
    double size_of(std::int64_t atom) const {
        return own_[atom] + scaled_.norms[atom] * size_ + scaled_.weights[atom] * shared_size_;
    }
    bool enters(std::int64_t atom) const { return w_[atom] > 0.5 * options_.tolerance * size_of(atom); }

    const NnlsProblem& problem_;
    const NnlsScaled& scaled_;
    const NnlsOptions& options_;
    const std::int64_t limit_;
    NnlsSupport support_;

    // The row at hand, in scaled variables.
    NnlsScaled::Row row_;
    std::vector<double> c_, own_, w_;  // right-hand side, its size, and gradient, by atom
    std::vector<Bar> bars_;            // by atom
    std::vector<double> minimum_;
    std::vector<double> steepness_;         // workspace
    std::vector<std::int64_t> candidates_;  // workspace
    std::int64_t iterations_ = 0;
    double size_ = 0.0;         // sum of |x| times the atom's norm
    double shared_size_ = 0.0;  // on the simplex, the size of the multiplier's terms
    bool bounded_ = false;
};

}  // namespace globe::detail
