// Non-negative least squares from a Gram matrix.
#pragma once

#include <cstdint>

#include "globe/export.h"

namespace globe {

// For every row c of correlations:
//
//     argmin  1/2 aᵀ gram a - cᵀ a + l1 sum(a)   subject to  a >= 0  [and sum(a) = 1]
//
// For atoms D (one per row) and a target t that is min |t - Dᵀ a|, with gram = D Dᵀ and c = D t.
struct NnlsProblem {
    const double* gram;          // m x m, row after row; symmetric, positive semidefinite, finite
    const double* correlations;  // n x m, finite
    std::int64_t m;              // 0 or more
    std::int64_t n;
    double l1 = 0.0;       // 0 or more; 0 with simplex
    bool simplex = false;  // sum(a) = 1
};

struct NnlsOptions {
    double tolerance = 1e-10;         // on both residuals
    std::int64_t max_iterations = 0;  // linear systems per row; 0: 10 m + 30
    // Most non-zeros of a row; 0: no bound. With a bound, atoms enter one at a time, by the largest gradient
    // relative to the atom's norm, until the row is optimal or has that many (orthogonal matching pursuit
    // with signs); atoms whose code falls to zero leave.
    std::int64_t max_support = 0;
    const bool* warm_start = nullptr;  // n x m: supports to start from; not read with max_support
};

enum class NnlsStatus : std::int8_t {
    optimal = 0,
    singular = 1,  // no minimum, the Gram matrix being singular: an atom is set aside, the rest is optimal
    not_converged = 2,  // max_iterations reached, or rounding kept the residual above the tolerance
    support_limit = 3,  // max_support kept an atom out: optimal among the atoms in use
    indefinite = 4,     // negative curvature met: not a Gram matrix, and perhaps not the least minimum
    overflow = 5,       // a code beyond the range stands as the largest number, or, on the simplex, the
                        // correlations are too large beside the Gram matrix
};

// Where the results go; any may be null.
struct NnlsResult {
    double* codes;             // n x m
    NnlsStatus* status;        // n
    std::int64_t* iterations;  // n: linear systems solved
    double* kkt_residual;      // n: largest violation of the optimality conditions among the atoms that the
                               // status speaks of, relative to max |c - l1| + max(diagonal) sum(a)
    // n: the largest over the same atoms, each relative to its own terms |c_j - l1| + |a_j| y, with |a_j| the
    // root of the diagonal and y = sum of |a_k| a_k; it does not change with the scale of any atom. On the
    // simplex |c_j - c_v| + sum of |c_k - c_v| a_k + (|a_j| + y) y, v being the atom that is best alone.
    double* scaled_residual = nullptr;
};

// Blocks of atoms are exchanged while that makes progress, in the manner of block principal pivoting (Kim and
// Park, SIAM J. Sci. Comput. 33, 2011); where it does not, the active-set method of Lawson and Hanson goes
// on, which cannot cycle. The solution does not depend on the scale of the atoms: each is brought to the size
// of the largest by a power of two. Everything is float64 and nothing is regularised. Rows are solved on
// their own: the result of a row depends neither on the other rows nor on the number of threads (0: one per
// hardware thread). Throws std::invalid_argument, naming the argument, where a value is out of its range.
GLOBE_API void nnls(const NnlsProblem& problem, const NnlsOptions& options, const NnlsResult& result,
                    int threads = 0);

// Rows [begin, end) of nnls, on the calling thread alone.
GLOBE_API void nnls_rows(const NnlsProblem& problem, const NnlsOptions& options, const NnlsResult& result,
                         std::int64_t begin, std::int64_t end);

}  // namespace globe
