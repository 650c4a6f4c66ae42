#include "nnls_solver.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace globe::detail {
namespace {

constexpr double eps = std::numeric_limits<double>::epsilon();
constexpr std::int64_t first_block = 8;  // atoms that may enter an empty support together
constexpr int patience = 8;              // exchanges without progress before atoms move one at a time

}  // namespace

NnlsSolver::NnlsSolver(const NnlsProblem& problem, const NnlsScaled& scaled, const NnlsOptions& options)
    : problem_(problem),
      scaled_(scaled),
      options_(options),
      limit_(options.max_iterations > 0 ? options.max_iterations : 10 * problem.m + 30),
      support_(scaled) {
    const auto m = static_cast<std::size_t>(problem.m);
    for (auto* vector : {&c_, &own_, &w_, &steepness_}) vector->resize(m);
    bars_.resize(m);
    candidates_.resize(m);
    minimum_.resize(support_.room());
}

void NnlsSolver::solve(std::int64_t row, const NnlsResult& result) {
    begin(row);
    if (options_.max_support > 0 || !exchange_blocks()) move_single_atoms();
    write(row, result);
}

void NnlsSolver::begin(std::int64_t row) {
    row_ = scaled_.scale(problem_.correlations + row * problem_.m, c_.data());
    for (std::int64_t j = 0; j < problem_.m; ++j) own_[j] = std::fabs(c_[j]);
    std::fill(bars_.begin(), bars_.end(), Bar::none);
    bounded_ = false;
    iterations_ = 0;
    support_.begin(c_.data());
    if (options_.warm_start != nullptr && options_.max_support == 0) {
        const bool* warm = options_.warm_start + row * problem_.m;
        for (std::int64_t j = 0; j < problem_.m; ++j) {
            if (warm[j]) support_.add(j);
        }
    }
    if (problem_.simplex && support_.size() == 0) start_at_vertex();
}

// Exchanges all infeasible atoms at once (Kim and Park 2011, section 3.2), but lets the support at most
// double, so that the factor grows with it from nothing. False where that makes no progress.
bool NnlsSolver::exchange_blocks() {
    std::int64_t fewest = problem_.m + 1;
    int patience_left = patience;
    for (;;) {
        if (!minimise_independent()) return false;
        find_gradient();
        const double zero = -eps * size_;
        std::int64_t infeasible = 0;
        for (std::int64_t k = 0; k < support_.size(); ++k) infeasible += support_.values()[k] < zero;
        const bool leaving = infeasible > 0;
        const std::int64_t candidates = find_candidates();
        infeasible += candidates;
        if (infeasible == 0) return true;
        if (infeasible < fewest) {
            fewest = infeasible;
            patience_left = patience;
        } else if (patience_left-- == 0) {
            return false;
        }
        if (leaving) {
            support_.revise([&](std::int64_t k) {
                const double value = support_.values()[k];
                return value < zero ? 0.0 : std::max(value, std::numeric_limits<double>::min());
            });
        }
        enter_steepest(candidates, std::max(support_.size(), first_block));
    }
}

// Takes dependent atoms out until the rest has a minimum. False at the limit, or on the simplex with no atom
// left.
bool NnlsSolver::minimise_independent() {
    while (support_.size() > 0) {
        if (iterations_ == limit_) return false;
        const std::int64_t place = support_.minimise();
        if (place == support_.size()) {
            ++iterations_;
            return true;
        }
        support_.remove(place);
    }
    return !problem_.simplex;
}

void NnlsSolver::find_gradient() {
    measure_values();
    support_.gradient(w_.data());
    for (std::int64_t k = 0; k < support_.size(); ++k) w_[support_.atom(k)] = 0.0;
}

void NnlsSolver::measure_values() {
    size_ = shared_size_ = 0.0;
    for (std::int64_t k = 0; k < support_.size(); ++k) {
        size_ += scaled_.norms[support_.atom(k)] * std::fabs(support_.values()[k]);
    }
    if (!problem_.simplex) return;
    for (std::int64_t k = 0; k < support_.size(); ++k) {
        shared_size_ += own_[support_.atom(k)] * std::fabs(support_.values()[k]);
    }
    shared_size_ += size_ * size_;
}

std::int64_t NnlsSolver::find_candidates() {
    const double half = 0.5 * options_.tolerance;
    const NnlsLeast least{half,        half * size_,         half * shared_size_,
                          own_.data(), scaled_.norms.data(), scaled_.weights.data()};
    return variant().nnls.exceeding(least, problem_.m, w_.data(), candidates_.data());
}

void NnlsSolver::enter_steepest(std::int64_t candidates, std::int64_t most) {
    double least = 0.0;
    std::int64_t ties = candidates;  // to accept at the least gradient itself
    if (candidates > most) {
        for (std::int64_t i = 0; i < candidates; ++i) steepness_[i] = w_[candidates_[i]];
        const auto last = steepness_.begin() + most - 1;
        std::nth_element(steepness_.begin(), last, steepness_.begin() + candidates, std::greater<>());
        least = *last;
        ties = most - std::count_if(steepness_.begin(), last, [&](double w) { return w > least; });
    }
    for (std::int64_t i = 0; i < candidates; ++i) {
        const double w = w_[candidates_[i]];
        if (w < least || (w == least && ties-- <= 0)) continue;
        support_.add(candidates_[i]);
    }
}

// Lawson and Hanson (1974, chapter 23): from one feasible point to another of a lower objective. With a bound
// on the support, ends where one more atom would exceed it.
void NnlsSolver::move_single_atoms() {
    if (options_.max_support == 0) make_feasible();
    if (!settle()) return;
    for (;;) {
        find_gradient();
        const std::int64_t atom = steepest_atom();
        if (atom < 0) return;
        bounded_ = options_.max_support > 0 && support_.size() >= options_.max_support;
        if (bounded_) return;
        support_.add(atom);
        if (!settle()) return;
    }
}

std::int64_t NnlsSolver::steepest_atom() {
    std::int64_t best = -1;
    double steepest = 0.0;
    for (std::int64_t j = 0; j < problem_.m; ++j) {
        if (!enters(j) || bars_[j] != Bar::none) continue;
        const double steepness = w_[j] / scaled_.norms[j];
        if (steepness > steepest) {
            steepest = steepness;
            best = j;
        }
    }
    return best;
}

// Walks to the minimum over the atoms in use; those whose values fall to zero leave on the way. False at the
// limit.
bool NnlsSolver::settle() {
    while (support_.size() > 0) {
        if (iterations_ == limit_) return false;
        const std::int64_t place = support_.minimise(minimum_.data());
        if (place < support_.size()) {
            const std::int64_t atom = support_.atom(place);
            const bool entering = support_.values()[place] == 0.0;
            support_.remove(place);
            support_.normalise();
            if (entering) exchange_dependent(atom);
        } else {
            ++iterations_;
            if (step_to_minimum()) return true;
        }
    }
    return true;
}

// An atom that should enter is a combination of those in use: along that combination the objective falls on a
// straight line, until an atom in use leaves. If none ever does, there is no minimum.
void NnlsSolver::exchange_dependent(std::int64_t atom) {
    if (support_.minimise(minimum_.data()) < support_.size()) return;
    support_.express(atom, minimum_.data());
    const double* from = support_.values();
    double size = 0.0, step = std::numeric_limits<double>::infinity();
    for (std::int64_t k = 0; k < support_.size(); ++k) size = std::max(size, std::fabs(minimum_[k]));
    const auto falls = [&](std::int64_t k) { return minimum_[k] > std::sqrt(eps) * size; };
    for (std::int64_t k = 0; k < support_.size(); ++k) {
        if (falls(k)) step = std::min(step, from[k] / minimum_[k]);
    }
    if (std::isinf(step)) {
        bars_[atom] = Bar::dependent;
        return;
    }
    support_.revise([&](std::int64_t k) {
        const bool leaves = falls(k) && from[k] / minimum_[k] <= step;
        return leaves ? 0.0 : from[k] - step * minimum_[k];
    });
    support_.add(atom, step);
    support_.normalise();
    std::fill(bars_.begin(), bars_.end(), Bar::none);
}

bool NnlsSolver::step_to_minimum() {
    const double* from = support_.values();
    const double* to = minimum_.data();
    const std::int64_t newest = support_.size() - 1;
    if (from[newest] == 0.0 && to[newest] <= 0.0) {
        bars_[support_.atom(newest)] = Bar::rounding;  // its gradient was nothing else
        support_.remove(newest);
        return false;
    }
    double step = 1.0;
    bool reached = true;
    for (std::int64_t k = 0; k <= newest; ++k) {
        if (to[k] > 0.0) continue;
        step = std::min(step, from[k] / (from[k] - to[k]));
        reached = false;
    }
    support_.revise([&](std::int64_t k) {
        if (reached) return to[k];
        const bool stops = to[k] <= 0.0 && from[k] / (from[k] - to[k]) <= step;
        return stops ? 0.0 : from[k] + step * (to[k] - from[k]);
    });
    if (!reached) std::fill(bars_.begin(), bars_.end(), Bar::none);
    return reached;
}

// Keeps the atoms with positive values, or the best vertex of the simplex where there are none.
void NnlsSolver::make_feasible() {
    support_.revise([&](std::int64_t k) { return support_.values()[k]; });
    if (problem_.simplex && support_.size() == 0) start_at_vertex();
    support_.normalise();
}

void NnlsSolver::start_at_vertex() {
    support_.add(row_.vertex, scaled_.inverse_weights[row_.vertex]);
}

void NnlsSolver::write(std::int64_t row, const NnlsResult& result) {
    make_feasible();
    const Residuals found = residuals();
    bool overflow = row_.overflow;
    double* codes = result.codes == nullptr ? nullptr : result.codes + row * problem_.m;
    if (codes != nullptr) std::fill(codes, codes + problem_.m, 0.0);
    for (std::int64_t k = 0; k < support_.size(); ++k) {
        const std::int64_t atom = support_.atom(k);
        const double code = scaled_.code(atom, support_.values()[k], row_);
        constexpr double most = std::numeric_limits<double>::max();
        overflow = overflow || code > most;
        if (codes != nullptr) codes[atom] = std::min(code, most);
    }
    if (result.kkt_residual != nullptr) result.kkt_residual[row] = found.kkt;
    if (result.scaled_residual != nullptr) result.scaled_residual[row] = found.scaled;
    if (result.iterations != nullptr) result.iterations[row] = iterations_;
    if (result.status != nullptr) result.status[row] = status_of(found, overflow);
}

NnlsSolver::Residuals NnlsSolver::residuals() {
    measure_values();
    support_.gradient(w_.data());
    double multiplier = 0.0, sum = 0.0;
    for (std::int64_t k = 0; k < support_.size(); ++k) {
        const std::int64_t atom = support_.atom(k);
        sum += scaled_.weights[atom] * support_.values()[k];
        multiplier += w_[atom] * support_.values()[k];
    }
    if (problem_.simplex) {
        for (std::int64_t j = 0; j < problem_.m; ++j) w_[j] -= multiplier * scaled_.weights[j];
    }
    Residuals found;
    const auto violate = [&](std::int64_t atom, double violation) {
        found.kkt = std::max(found.kkt, violation * scaled_.inverse_weights[atom]);
        if (violation <= found.scaled * size_of(atom) || std::isnan(found.scaled)) return;
        found.scaled = violation / size_of(atom);
    };
    for (std::int64_t k = 0; k < support_.size(); ++k) {
        double& w = w_[support_.atom(k)];
        violate(support_.atom(k), std::fabs(w));
        w = 0.0;
    }
    for (std::int64_t j = 0; j < problem_.m && !bounded_; ++j) {
        if (!(w_[j] <= 0.0) && bars_[j] != Bar::dependent) violate(j, w_[j]);
    }
    if (found.kkt > 0.0) found.kkt /= row_.size + scaled_.largest * sum;
    return found;
}

NnlsStatus NnlsSolver::status_of(const Residuals& found, bool overflow) const {
    if (overflow) return NnlsStatus::overflow;
    if (scaled_.indefinite || support_.concave()) return NnlsStatus::indefinite;
    if (!(found.kkt <= options_.tolerance && found.scaled <= options_.tolerance))
        return NnlsStatus::not_converged;
    if (bounded_) return NnlsStatus::support_limit;
    const bool singular = std::find(bars_.begin(), bars_.end(), Bar::dependent) != bars_.end();
    return singular ? NnlsStatus::singular : NnlsStatus::optimal;
}

}  // namespace globe::detail
