// Inner loops of nnls: the Cholesky factor of a principal submatrix of the Gram matrix, its triangular solves
// and the gradient. Included by variant.cpp alone.
//
// The factor is U with Uᵀ U = G_PP + lift q qᵀ. It is kept in panels of `width` columns, one vector wide:
// panel J holds the rows 0 .. width * (J + 1) one after the other, so every loop below reads memory in order,
// the storage does not depend on how large P may grow, and atoms are appended without moving anything. The
// diagonal holds reciprocals. The last panel is filled up with columns of the identity.
#pragma once

#include "../variant.hpp"
#include "vector.hpp"

namespace globe::detail::GLOBE_VARIANT {
namespace {
namespace nnls {

constexpr std::int64_t width = lanes / 2;

// Panels that one tile of the factor covers: their sums, width x panels vectors, stay in registers.
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr int tile_panels = 3;
#else
constexpr int tile_panels = 4;
#endif

GLOBE_INLINE F64 splat(double value) {
    return value - F64{};
}

GLOBE_INLINE double total(const F64& value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_pd(bits_of<__m512d>(value));
#else
    double sum = value[0] + value[1];
    for (int i = 2; i < width; i += 2) sum += value[i] + value[i + 1];
    return sum;
#endif
}

GLOBE_INLINE double* panel(double* factor, std::int64_t number) {
    return factor + width * width * number * (number + 1) / 2;
}

GLOBE_INLINE const double* panel(const double* factor, std::int64_t number) {
    return factor + width * width * number * (number + 1) / 2;
}

// Fills a panel with the entries of the Gram matrix that its factor replaces.
inline void gather(const NnlsGram& gram, const std::int64_t* atoms, std::int64_t count, std::int64_t number,
                   double* to) {
    const std::int64_t column = number * width, used = count - column < width ? count - column : width;
    const double* rows[width];
    F64 lifts;
    for (std::int64_t i = 0; i < width; ++i) {
        const std::int64_t atom = atoms[column + (i < used ? i : 0)];
        rows[i] = gram.data + atom * gram.size;
        lifts[i] = gram.lift * gram.weights[atom];
    }
    const std::int64_t stop = column + used;
    for (std::int64_t k = 0; k < stop; ++k) {
        const std::int64_t atom = atoms[k];
        F64 entries;
        for (int i = 0; i < width; ++i) entries[i] = rows[i][atom];
        store(to + k * width, entries + splat(gram.weights[atom]) * lifts);
    }
    if (used == width) return;
    for (std::int64_t k = 0; k < column + width; ++k) {
        for (std::int64_t i = k < stop ? used : 0; i < width; ++i) {
            to[k * width + i] = k == column + i ? 1.0 : 0.0;
        }
    }
}

// The rows of `panels` panels from `first` on that belong to panel `row`, less what the rows above explain.
template <int panels>
GLOBE_INLINE void eliminate(const double* left, double* const* targets, std::int64_t above,
                            F64 (&sums)[width][panels]) {
    for (int i = 0; i < width; ++i) {
        for (int v = 0; v < panels; ++v) sums[i][v] = load<F64>(targets[v] + (above + i) * width);
    }
    for (std::int64_t k = 0; k < above; ++k) {
        F64 entries[panels];
        for (int v = 0; v < panels; ++v) entries[v] = load<F64>(targets[v] + k * width);
        for (int i = 0; i < width; ++i) {
            const F64 weight = splat(left[k * width + i]);
            for (int v = 0; v < panels; ++v) sums[i][v] -= weight * entries[v];
        }
    }
}

// Rows of the factor right of the diagonal.
template <int panels>
void right_tile(double* factor, std::int64_t row, std::int64_t first) {
    const double* left = panel(factor, row);
    double* targets[panels];
    for (int v = 0; v < panels; ++v) targets[v] = panel(factor, first + v);
    const std::int64_t above = width * row;
    F64 sums[width][panels];
    eliminate<panels>(left, targets, above, sums);
    const double* corner = left + above * width;
    for (int i = 0; i < width; ++i) {
        const F64 reciprocal = splat(corner[i * width + i]);
        for (int v = 0; v < panels; ++v) sums[i][v] *= reciprocal;
        for (int l = i + 1; l < width; ++l) {
            const F64 weight = splat(corner[i * width + l]);
            for (int v = 0; v < panels; ++v) sums[l][v] -= weight * sums[i][v];
        }
        for (int v = 0; v < panels; ++v) store(targets[v] + (above + i) * width, sums[i][v]);
    }
}

// Rows of the factor from the diagonal on. Returns how many pivots come before the first that is not larger
// than its floor.
template <int panels>
std::int64_t diagonal_tile(double* factor, std::int64_t row, const double* floors) {
    double* targets[panels];
    for (int v = 0; v < panels; ++v) targets[v] = panel(factor, row + v);
    const std::int64_t above = width * row;
    F64 sums[width][panels];
    eliminate<panels>(targets[0], targets, above, sums);
    double pivots[width];
    for (int i = 0; i < width; ++i) {
        pivots[i] = sums[i][0][i];
        const double reciprocal = 1.0 / pivots[i];
        for (int l = i + 1; l < width; ++l) {
            const F64 weight = splat(sums[i][0][l] * reciprocal);
            for (int v = 0; v < panels; ++v) sums[l][v] -= weight * sums[i][v];
        }
    }
    std::int64_t good = 0;
    while (good < width && pivots[good] > floors[good]) ++good;
    for (int i = 0; i < width; ++i) {
        const double reciprocal = 1.0 / __builtin_sqrt(pivots[i]);
        double* to = targets[0] + (above + i) * width;
        for (int v = 0; v < panels; ++v) {
            store(targets[v] + (above + i) * width, sums[i][v] * splat(reciprocal));
        }
        to[i] = reciprocal;
    }
    return good;
}

void right_tiles(int panels, double* factor, std::int64_t first) {
    for (std::int64_t row = 0; row < first; ++row) {
        switch (panels) {
            case 1:
                right_tile<1>(factor, row, first);
                break;
            case 2:
                right_tile<2>(factor, row, first);
                break;
            case 3:
                right_tile<3>(factor, row, first);
                break;
            default:
                right_tile<tile_panels>(factor, row, first);
        }
    }
}

std::int64_t diagonal_tiles(int panels, double* factor, std::int64_t row, const double* floors) {
    switch (panels) {
        case 1:
            return diagonal_tile<1>(factor, row, floors);
        case 2:
            return diagonal_tile<2>(factor, row, floors);
        case 3:
            return diagonal_tile<3>(factor, row, floors);
        default:
            return diagonal_tile<tile_panels>(factor, row, floors);
    }
}

// Appends atoms to a factor whose first `kept` are right. Returns how many atoms come before the first one
// that depends on those before it, to rounding; count if there is none.
std::int64_t extend(const NnlsGram& gram, const std::int64_t* atoms, std::int64_t count, std::int64_t kept,
                    double* factor) {
    constexpr double rounding = 4 * 2.220446049250313e-16;
    const std::int64_t panels = (count + width - 1) / width;
    for (std::int64_t first = kept / width; first < panels; first += tile_panels) {
        const int wide = static_cast<int>(panels - first < tile_panels ? panels - first : tile_panels);
        for (int v = 0; v < wide; ++v) gather(gram, atoms, count, first + v, panel(factor, first + v));
        right_tiles(wide, factor, first);
        for (int v = 0; v < wide; ++v) {
            double floors[width];
            const std::int64_t begin = (first + v) * width;
            for (std::int64_t i = 0; i < width; ++i) {
                double size = 0.0;
                if (begin + i < count) {
                    const std::int64_t atom = atoms[begin + i];
                    const double weight = gram.weights[atom];
                    size = gram.data[atom * (gram.size + 1)] + gram.lift * weight * weight;
                }
                floors[i] = rounding * static_cast<double>(begin + i + 1) * size;
            }
            const std::int64_t good = diagonal_tiles(wide - v, factor, first + v, floors);
            if (good < width) return begin + good;
        }
    }
    return count;
}

// The triangles on the diagonal, in steps known to the compiler, so that `rest` stays in registers.
template <int i = 0>
GLOBE_INLINE void forward_corner(const double* corner, double (&rest)[width], double* y) {
    const double value = y[i] = rest[i] * corner[i * width + i];
    for (int l = i + 1; l < width; ++l) rest[l] -= value * corner[i * width + l];
    if constexpr (i + 1 < width) forward_corner<i + 1>(corner, rest, y);
}

template <int i = width - 1>
GLOBE_INLINE void backward_corner(const double* corner, double (&rest)[width], double* x) {
    const double value = x[i] = rest[i] * corner[i * width + i];
    for (int l = 0; l < i; ++l) rest[l] -= value * corner[l * width + i];
    if constexpr (i > 0) backward_corner<i - 1>(corner, rest, x);
}

// Solves Uᵀ y = b, where the first `kept` entries of y are known and the others hold b.
void forward(const double* factor, std::int64_t count, std::int64_t kept, double* y) {
    for (std::int64_t row = kept / width; row * width < count; ++row) {
        const double* entries = panel(factor, row);
        const std::int64_t above = row * width;
        F64 sums[4] = {load<F64>(y + above)};
        for (std::int64_t k = 0; k < above; k += width) {
            for (int i = 0; i < width; ++i)
                sums[i % 4] -= splat(y[k + i]) * load<F64>(entries + (k + i) * width);
        }
        double rest[width];
        store(rest, (sums[0] + sums[1]) + (sums[2] + sums[3]));
        forward_corner(entries + above * width, rest, y + above);
    }
}

// Solves U x = y. Both have room for whole vectors.
void backward(const double* factor, std::int64_t count, const double* y, double* x) {
    const std::int64_t panels = (count + width - 1) / width;
    for (std::int64_t row = panels - 1; row >= 0; --row) {
        const std::int64_t above = row * width;
        F64 sums[width];
        for (int i = 0; i < width; ++i) sums[i] = F64{};
        for (std::int64_t right = row + 1; right < panels; ++right) {
            const double* entries = panel(factor, right) + above * width;
            const F64 known = load<F64>(x + right * width);
            for (int i = 0; i < width; ++i) sums[i] += load<F64>(entries + i * width) * known;
        }
        double rest[width];
        for (int i = 0; i < width; ++i) rest[i] = y[above + i] - total(sums[i]);
        backward_corner(panel(factor, row) + above * width, rest, x + above);
    }
}

template <int vectors>
GLOBE_INLINE void gradient_tile(const NnlsGram& gram, const std::int64_t* atoms, std::int64_t count,
                                const double* x, const double* c, double multiplier, std::int64_t column,
                                double* w) {
    F64 sums[vectors];
    for (int v = 0; v < vectors; ++v) {
        sums[v] = load<F64>(c + column + v * width) +
                  splat(multiplier) * load<F64>(gram.weights + column + v * width);
    }
    for (std::int64_t k = 0; k < count; ++k) {
        const double* row = gram.data + atoms[k] * gram.size + column;
        const F64 weight = splat(x[k]);
        for (int v = 0; v < vectors; ++v) sums[v] -= weight * load<F64>(row + v * width);
    }
    for (int v = 0; v < vectors; ++v) store(w + column + v * width, sums[v]);
}

// w = c + multiplier * weights - sum of x[k] * G[atoms[k]]
void gradient(const NnlsGram& gram, const std::int64_t* atoms, std::int64_t count, const double* x,
              const double* c, double multiplier, double* w) {
    constexpr std::int64_t wide = 8 * width;
    std::int64_t column = 0;
    for (; column + wide <= gram.size; column += wide) {
        gradient_tile<8>(gram, atoms, count, x, c, multiplier, column, w);
    }
    for (; column + width <= gram.size; column += width) {
        gradient_tile<1>(gram, atoms, count, x, c, multiplier, column, w);
    }
    for (; column < gram.size; ++column) {
        double sum = c[column] + multiplier * gram.weights[column];
        for (std::int64_t k = 0; k < count; ++k) sum -= x[k] * gram.data[atoms[k] * gram.size + column];
        w[column] = sum;
    }
}

// The atoms whose gradient exceeds what it must; returns how many.
std::int64_t exceeding(const NnlsLeast& least, std::int64_t size, const double* w, std::int64_t* found) {
    std::int64_t count = 0, column = 0;
    const F64 half = splat(least.half), by_norm = splat(least.by_norm), by_weight = splat(least.by_weight);
    for (; column + width <= size; column += width) {
        double excess[width];
        store(excess, load<F64>(w + column) - half * load<F64>(least.own + column) -
                          by_norm * load<F64>(least.norms + column) -
                          by_weight * load<F64>(least.weights + column));
        for (int i = 0; i < width; ++i) {
            found[count] = column + i;
            count += excess[i] > 0.0;
        }
    }
    for (; column < size; ++column) {
        found[count] = column;
        count += w[column] > least.half * least.own[column] + least.by_norm * least.norms[column] +
                                 least.by_weight * least.weights[column];
    }
    return count;
}

}  // namespace nnls
}  // namespace
}  // namespace globe::detail::GLOBE_VARIANT
