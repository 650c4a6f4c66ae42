#include "globe/nnls.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "globe/parallel.hpp"
#include "variant.hpp"

namespace globe {
namespace {

constexpr double eps = std::numeric_limits<double>::epsilon();
constexpr std::int64_t first_block = 8;  // atoms that enter an empty support together
constexpr int patience = 8;              // exchanges without progress before one atom moves at a time
constexpr std::int64_t rows_per_task = 16;

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

void validate(const NnlsProblem& problem, const NnlsOptions& options) {
    require(problem.m >= 1, "m: found " + std::to_string(problem.m) + "; expected at least 1");
    require(problem.n >= 0, "n: found " + std::to_string(problem.n) + "; expected at least 0");
    require(problem.l1 >= 0.0, "l1: found " + std::to_string(problem.l1) + "; expected at least 0");
    require(!problem.simplex || problem.l1 == 0.0,
            "l1: found " + std::to_string(problem.l1) + " with simplex; expected 0");
    require(options.tolerance > 0.0 && options.tolerance < 1.0,
            "tolerance: found " + std::to_string(options.tolerance) + "; expected a number between 0 and 1");
    require(options.max_iterations >= 0,
            "max_iterations: found " + std::to_string(options.max_iterations) + "; expected at least 0");
    require(options.max_support >= 0,
            "max_support: found " + std::to_string(options.max_support) + "; expected at least 0");
}

// Solves row after row, with memory for one.
class Solver {
  public:
    Solver(const NnlsProblem& problem, const NnlsOptions& options)
        : problem_(problem),
          options_(options),
          loops_(detail::variant().nnls),
          m_(problem.m),
          limit_(options.max_iterations > 0 ? options.max_iterations : 10 * problem.m + 30),
          gram_{problem.gram, problem.m, 0.0},
          factor_(static_cast<std::size_t>((m_ + 16) * (m_ + 24) / 2)) {
        for (std::int64_t j = 0; j < m_; ++j) largest_ = std::max(largest_, diagonal(j));
        // On the simplex 1/2 aᵀ (s 11ᵀ) a is constant. Adding it to the Gram matrix leaves the problem as it
        // is and makes the matrix definite wherever the solution is unique. Not a ridge.
        if (problem.simplex) gram_.shift = largest_ > 0.0 ? largest_ : 1.0;
        const auto padded = static_cast<std::size_t>(m_ + 16);
        for (auto* vector : {&c_, &w_, &x_, &side_, &ones_side_, &ones_, &scratch_}) vector->resize(padded);
        used_.resize(padded);
        aside_.resize(padded);
        order_.reserve(padded);
    }

    void solve(std::int64_t row, const NnlsResult& result) {
        start(row);
        bool done = false;
        if (options_.max_support == 0) done = exchange_blocks();
        if (!done) move_single_atoms();
        finish(row, result);
    }

  private:
    double diagonal(std::int64_t atom) const { return problem_.gram[atom * (m_ + 1)]; }
    std::int64_t count() const { return static_cast<std::int64_t>(order_.size()); }
    double threshold(double size) const { return 0.5 * options_.tolerance * (scale_ + largest_ * size); }

    double size_of_x() const {
        double size = 0.0;
        for (std::int64_t k = 0; k < count(); ++k) size += std::fabs(x_[k]);
        return size;
    }

    void start(std::int64_t row) {
        const double* c = problem_.correlations + row * m_;
        order_.clear();
        std::fill(used_.begin(), used_.end(), 0);
        std::fill(aside_.begin(), aside_.end(), 0);
        kept_ = 0;
        iterations_ = 0;
        any_aside_ = bounded_ = false;
        multiplier_ = 0.0;
        // The multiplier of sum(a) = 1 absorbs any constant in c; taking it out first avoids cancellation.
        const std::int64_t vertex = problem_.simplex ? best_vertex(c) : 0;
        const double constant = problem_.simplex ? c[vertex] : problem_.l1;
        scale_ = 0.0;
        for (std::int64_t j = 0; j < m_; ++j) {
            scale_ = std::max(scale_, std::fabs(problem_.simplex ? c[j] : c[j] - constant));
            c_[j] = c[j] - constant;
        }
        if (problem_.simplex) scale_ += largest_;
        if (options_.max_support == 0 && options_.warm_start != nullptr) {
            const bool* warm = options_.warm_start + row * m_;
            for (std::int64_t j = 0; j < m_; ++j) {
                if (warm[j]) add(j);
            }
        }
        if (problem_.simplex && order_.empty()) {
            add(vertex);
            x_[0] = 1.0;
        }
    }

    std::int64_t best_vertex(const double* c) const {
        std::int64_t best = 0;
        double lowest = 0.5 * diagonal(0) - c[0];
        for (std::int64_t j = 1; j < m_; ++j) {
            const double value = 0.5 * diagonal(j) - c[j];
            if (value < lowest) {
                lowest = value;
                best = j;
            }
        }
        return best;
    }

    void add(std::int64_t atom) {
        order_.push_back(atom);
        used_[atom] = 1;
    }

    // Takes out the atom at a place in the order, with its value.
    void remove(std::int64_t place) {
        used_[order_[place]] = 0;
        order_.erase(order_.begin() + place);
        std::copy(x_.begin() + place + 1, x_.begin() + count() + 1, x_.begin() + place);
        kept_ = std::min(kept_, place);
    }

    // Minimises over the atoms in order_, without signs, into target. Returns the place of the first atom that
    // depends on those before it; count() if all went well.
    std::int64_t minimise(std::vector<double>& target) {
        const std::int64_t independent =
            loops_.extend(gram_, order_.data(), count(), kept_, factor_.data());
        if (independent < count()) {
            kept_ = std::min(kept_, independent);
            return independent;
        }
        const std::int64_t padded = count() + 8;
        for (std::int64_t k = kept_ / 8 * 8; k < padded; ++k) {
            side_[k] = k < count() ? c_[order_[k]] : 0.0;
            ones_side_[k] = k < count() ? 1.0 : 0.0;
        }
        loops_.forward(factor_.data(), count(), kept_ / 8 * 8, side_.data());
        loops_.backward(factor_.data(), count(), side_.data(), target.data());
        if (problem_.simplex) {
            loops_.forward(factor_.data(), count(), kept_ / 8 * 8, ones_side_.data());
            loops_.backward(factor_.data(), count(), ones_side_.data(), ones_.data());
            double free = 0.0, ones = 0.0;
            for (std::int64_t k = 0; k < count(); ++k) {
                free += target[k];
                ones += ones_[k];
            }
            multiplier_ = (1.0 - free) / ones;
            for (std::int64_t k = 0; k < count(); ++k) target[k] += multiplier_ * ones_[k];
        }
        kept_ = count();
        return count();
    }

    // w = c + multiplier - (G + shift) x
    void find_gradient() {
        double sum = 0.0;
        for (std::int64_t k = 0; k < count(); ++k) sum += x_[k];
        loops_.gradient(gram_, order_.data(), count(), x_.data(), c_.data(), multiplier_ - gram_.shift * sum,
                        w_.data());
    }

    // Exchanges all infeasible atoms at once, but lets the support at most double. False where that makes no
    // progress.
    bool exchange_blocks() {
        std::int64_t fewest = m_ + 1;
        int patience_left = patience;
        for (;;) {
            while (!order_.empty()) {
                if (iterations_ == limit_) return false;
                ++iterations_;
                const std::int64_t place = minimise(x_);
                if (place == count()) break;
                remove(place);
            }
            if (problem_.simplex && order_.empty()) return false;
            if (order_.empty()) multiplier_ = 0.0;
            find_gradient();
            const double size = size_of_x();
            const double least = threshold(size);
            candidates_.clear();
            for (std::int64_t j = 0; j < m_; ++j) {
                if (w_[j] > least && !used_[j]) candidates_.push_back(j);
            }
            std::int64_t negative = 0;
            for (std::int64_t k = 0; k < count(); ++k) negative += x_[k] < -eps * size;
            const auto entering = static_cast<std::int64_t>(candidates_.size());
            if (negative + entering == 0) return true;
            if (negative + entering < fewest) {
                fewest = negative + entering;
                patience_left = patience;
            } else if (--patience_left < 0) {
                return false;
            }
            if (negative > 0) drop_negative(-eps * size);
            enter(std::max(count(), first_block));
        }
    }

    void drop_negative(double floor) {
        std::int64_t left = 0;
        for (std::int64_t k = 0; k < count(); ++k) {
            if (x_[k] < floor) {
                used_[order_[k]] = 0;
                kept_ = std::min(kept_, k);
            } else {
                x_[left] = x_[k];
                order_[left++] = order_[k];
            }
        }
        order_.resize(left);
    }

    // Adds the `most` candidates of the largest gradient.
    void enter(std::int64_t most) {
        if (static_cast<std::int64_t>(candidates_.size()) > most) {
            std::nth_element(candidates_.begin(), candidates_.begin() + most, candidates_.end(),
                             [this](std::int64_t a, std::int64_t b) {
                                 return w_[a] > w_[b] || (w_[a] == w_[b] && a < b);
                             });
            candidates_.resize(most);
            std::sort(candidates_.begin(), candidates_.end());
        }
        for (const std::int64_t atom : candidates_) add(atom);
    }

    // Lawson and Hanson: every step goes to a feasible point of a lower objective.
    void move_single_atoms() {
        make_feasible();
        bool settled = order_.empty();
        for (;;) {
            if (!settled && !settle()) return;
            settled = false;
            if (order_.empty()) multiplier_ = 0.0;
            find_gradient();
            const double least = threshold(size_of_x());
            std::int64_t best = -1;
            double steepest = 0.0;
            for (std::int64_t j = 0; j < m_; ++j) {
                if (used_[j] || aside_[j] || w_[j] <= least) continue;
                const double slope = w_[j] / std::sqrt(diagonal(j) + gram_.shift);
                if (slope > steepest) {
                    steepest = slope;
                    best = j;
                }
            }
            if (best < 0) return;
            if (options_.max_support > 0 && count() >= options_.max_support) {
                bounded_ = true;
                return;
            }
            add(best);
            x_[count() - 1] = 0.0;
        }
    }

    // The atoms with positive values, scaled to the simplex; there, a vertex if there are none.
    void make_feasible() {
        double sum = 0.0;
        std::int64_t left = 0;
        for (std::int64_t k = 0; k < count(); ++k) {
            if (x_[k] > 0.0) {
                sum += x_[k];
                x_[left] = x_[k];
                order_[left++] = order_[k];
            } else {
                used_[order_[k]] = 0;
                kept_ = std::min(kept_, k);
            }
        }
        order_.resize(left);
        if (!problem_.simplex) return;
        if (order_.empty()) {
            add(best_vertex(c_.data()));
            x_[0] = sum = 1.0;
        }
        for (std::int64_t k = 0; k < count(); ++k) x_[k] /= sum;
    }

    // Walks from x to the minimum over the atoms in use; those that reach zero are dropped on the way.
    // False at the limit of iterations.
    bool settle() {
        while (!order_.empty()) {
            if (iterations_ == limit_) return false;
            ++iterations_;
            const std::int64_t place = minimise(scratch_);
            if (place < count()) {
                put_aside(place);
                continue;
            }
            double step = 1.0;
            bool blocked = false;
            const std::int64_t last = count() - 1;
            if (x_[last] == 0.0 && scratch_[last] <= 0.0) {  // its gradient was rounding noise
                aside_[order_[last]] = 2;
                remove(last);
                continue;
            }
            for (std::int64_t k = 0; k <= last; ++k) {
                if (scratch_[k] > 0.0) continue;
                step = std::min(step, x_[k] / (x_[k] - scratch_[k]));
                blocked = true;
            }
            if (!blocked) {
                x_.swap(scratch_);
                return true;
            }
            std::int64_t left = 0;
            for (std::int64_t k = 0; k <= last; ++k) {
                const bool falling = scratch_[k] <= 0.0;
                const double moved = x_[k] + step * (scratch_[k] - x_[k]);
                if (moved <= 0.0 || (falling && x_[k] / (x_[k] - scratch_[k]) <= step)) {
                    used_[order_[k]] = 0;
                    kept_ = std::min(kept_, k);
                } else {
                    x_[left] = moved;
                    order_[left++] = order_[k];
                }
            }
            order_.resize(left);
            std::fill(aside_.begin(), aside_.end(), 0);
        }
        return true;
    }

    void put_aside(std::int64_t place) {
        aside_[order_[place]] = 1;
        const double value = x_[place];
        remove(place);
        if (!problem_.simplex || value <= 0.0) return;
        double sum = 0.0;
        for (std::int64_t k = 0; k < count(); ++k) sum += x_[k];
        for (std::int64_t k = 0; k < count(); ++k) x_[k] /= sum;
    }

    void finish(std::int64_t row, const NnlsResult& result) {
        make_feasible();
        find_gradient();
        double mean = 0.0, sum = 0.0;
        for (std::int64_t k = 0; k < count(); ++k) {
            sum += x_[k];
            mean += w_[order_[k]];
        }
        mean = problem_.simplex ? mean / static_cast<double>(count()) : 0.0;
        double violation = 0.0;
        for (std::int64_t j = 0; j < m_; ++j) {
            if (used_[j]) {
                violation = std::max(violation, std::fabs(w_[j] - mean));
            } else if (aside_[j] != 1 && !bounded_) {
                violation = std::max(violation, w_[j] - mean);
            }
        }
        const double scale = scale_ + largest_ * sum;
        const double residual = violation > 0.0 ? violation / scale : 0.0;
        bool singular = false;
        for (std::int64_t j = 0; j < m_; ++j) singular = singular || aside_[j] == 1;
        if (result.codes != nullptr) {
            double* codes = result.codes + row * m_;
            std::fill(codes, codes + m_, 0.0);
            for (std::int64_t k = 0; k < count(); ++k) codes[order_[k]] = x_[k];
        }
        if (result.kkt_residual != nullptr) result.kkt_residual[row] = residual;
        if (result.iterations != nullptr) result.iterations[row] = iterations_;
        if (result.status != nullptr) {
            result.status[row] = !(residual <= options_.tolerance) ? NnlsStatus::not_converged
                                 : bounded_                        ? NnlsStatus::support_limit
                                 : singular                        ? NnlsStatus::singular
                                                                   : NnlsStatus::optimal;
        }
    }

    const NnlsProblem& problem_;
    const NnlsOptions& options_;
    const detail::NnlsLoops& loops_;
    const std::int64_t m_, limit_;
    detail::NnlsGram gram_;
    double largest_ = 0.0;

    // The row at hand. order_ holds the atoms in use, the newest last, and x_ their values in that order.
    std::vector<std::int64_t> order_, candidates_;
    std::vector<unsigned char> used_, aside_;  // by atom
    std::vector<double> c_, w_;                // by atom
    std::vector<double> x_, scratch_, side_, ones_side_, ones_;
    std::vector<double> factor_;
    std::int64_t kept_ = 0;  // atoms at the front of order_ that the factor covers
    std::int64_t iterations_ = 0;
    double scale_ = 0.0, multiplier_ = 0.0;
    bool any_aside_ = false, bounded_ = false;
};

}  // namespace

void nnls(const NnlsProblem& problem, const NnlsOptions& options, const NnlsResult& result, int threads) {
    validate(problem, options);
    const std::int64_t tasks = (problem.n + rows_per_task - 1) / rows_per_task;
    parallel_for(tasks, threads, [&](std::int64_t task) {
        nnls_rows(problem, options, result, task * rows_per_task,
                  std::min(problem.n, (task + 1) * rows_per_task));
    });
}

void nnls_rows(const NnlsProblem& problem, const NnlsOptions& options, const NnlsResult& result,
               std::int64_t begin, std::int64_t end) {
    validate(problem, options);
    require(0 <= begin && begin <= end && end <= problem.n,
            "begin, end: found " + std::to_string(begin) + ", " + std::to_string(end) +
                "; expected a range of the " + std::to_string(problem.n) + " rows");
    if (begin == end) return;
    Solver solver(problem, options);
    for (std::int64_t row = begin; row < end; ++row) solver.solve(row, result);
}

}  // namespace globe
