#include "globe/compose.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "globe/parallel.hpp"

// One copy of a loop per instruction set, chosen once when the library is loaded. Sanitizers start after
// that moment, so they get the plain loop.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GLOBE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GLOBE_CLONES
#endif

#if defined(__GNUC__)
#define GLOBE_INLINE inline __attribute__((always_inline))
#define GLOBE_RESTRICT __restrict__
#else
#define GLOBE_INLINE inline
#define GLOBE_RESTRICT __restrict
#endif

namespace globe {
namespace {

// A tile of 1024 sums takes 4 KiB; the same tile of 128 atoms 256 KiB in 16 bits, so it stays in cache
// while every row reads it.
constexpr std::int64_t tile_width = 1024;

GLOBE_INLINE float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

GLOBE_INLINE std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Float32 {
    using storage = float;
    static GLOBE_INLINE float load(storage value) { return value; }
    static GLOBE_INLINE storage store(float value) { return value; }
};

struct BFloat16 {
    using storage = std::uint16_t;
    static GLOBE_INLINE float load(storage value) {
        return as_float(static_cast<std::uint32_t>(value) << 16);
    }
    static GLOBE_INLINE storage store(float value) {
        const std::uint32_t bits = as_bits(value);
        const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
        const std::uint32_t nan = (bits >> 16) | 0x40U;
        return static_cast<storage>((bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded);
    }
};

struct Float16 {
    using storage = std::uint16_t;
    static GLOBE_INLINE float load(storage value) {
        // Widen the mantissa, then multiply by 2^112 to correct the exponent; subnormals come out right.
        const std::uint32_t magnitude = value & 0x7FFFU;
        const std::uint32_t scaled = as_bits(as_float(magnitude << 13) * as_float(0x77800000U));
        const std::uint32_t special = magnitude >= 0x7C00U ? 0x7F800000U : 0U;
        return as_float(scaled | special | (static_cast<std::uint32_t>(value & 0x8000U) << 16));
    }
    static GLOBE_INLINE storage store(float value) {
        const std::uint32_t bits = as_bits(value);
        const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
        const std::uint32_t normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
        // Adding 0.5 lets the hardware round to the spacing of subnormals.
        const std::uint32_t subnormal = as_bits(as_float(magnitude) + 0.5F) - 0x3F000000U;
        const std::uint32_t special = magnitude > 0x7F800000U ? 0x7E00U : 0x7C00U;
        const std::uint32_t finite = magnitude < 0x38800000U ? subnormal : normal;
        return static_cast<storage>((magnitude >= 0x47800000U ? special : finite) | ((bits >> 16) & 0x8000U));
    }
};

// One entry of a row of codes: where the tile of its atom starts in bytes, and its weight.
struct Term {
    const unsigned char* atom;
    float scale;
};

// Four terms a pass, so that the sums are loaded and stored a quarter as often. They are added one after
// the other, so that the result is that of four passes.
template <class Type>
GLOBE_INLINE void add_terms(float* GLOBE_RESTRICT sums, const Term* terms, std::int64_t count,
                            std::int64_t offset, std::int64_t width) {
    using Storage = typename Type::storage;
    const auto tile = [offset](const Term& term) {
        return reinterpret_cast<const Storage*>(term.atom) + offset;
    };
    std::int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const Storage* GLOBE_RESTRICT a = tile(terms[k]);
        const Storage* GLOBE_RESTRICT b = tile(terms[k + 1]);
        const Storage* GLOBE_RESTRICT c = tile(terms[k + 2]);
        const Storage* GLOBE_RESTRICT d = tile(terms[k + 3]);
        const float sa = terms[k].scale, sb = terms[k + 1].scale, sc = terms[k + 2].scale,
                    sd = terms[k + 3].scale;
        for (std::int64_t t = 0; t < width; ++t) {
            sums[t] = (((sums[t] + sa * Type::load(a[t])) + sb * Type::load(b[t])) + sc * Type::load(c[t])) +
                      sd * Type::load(d[t]);
        }
    }
    for (; k < count; ++k) {
        const Storage* GLOBE_RESTRICT a = tile(terms[k]);
        const float scale = terms[k].scale;
        for (std::int64_t t = 0; t < width; ++t) sums[t] += scale * Type::load(a[t]);
    }
}

template <class Type>
GLOBE_INLINE void write(const float* GLOBE_RESTRICT sums, void* row, std::int64_t offset,
                        std::int64_t width) {
    auto* GLOBE_RESTRICT target = static_cast<typename Type::storage*>(row) + offset;
    for (std::int64_t t = 0; t < width; ++t) target[t] = Type::store(sums[t]);
}

using AddTerms = void (*)(float*, const Term*, std::int64_t, std::int64_t, std::int64_t);
using Write = void (*)(const float*, void*, std::int64_t, std::int64_t);

GLOBE_CLONES void add_float32(float* sums, const Term* terms, std::int64_t count, std::int64_t offset,
                              std::int64_t width) {
    add_terms<Float32>(sums, terms, count, offset, width);
}
GLOBE_CLONES void add_float16(float* sums, const Term* terms, std::int64_t count, std::int64_t offset,
                              std::int64_t width) {
    add_terms<Float16>(sums, terms, count, offset, width);
}
GLOBE_CLONES void add_bfloat16(float* sums, const Term* terms, std::int64_t count, std::int64_t offset,
                               std::int64_t width) {
    add_terms<BFloat16>(sums, terms, count, offset, width);
}
GLOBE_CLONES void write_float32(const float* sums, void* row, std::int64_t offset, std::int64_t width) {
    write<Float32>(sums, row, offset, width);
}
GLOBE_CLONES void write_float16(const float* sums, void* row, std::int64_t offset, std::int64_t width) {
    write<Float16>(sums, row, offset, width);
}
GLOBE_CLONES void write_bfloat16(const float* sums, void* row, std::int64_t offset, std::int64_t width) {
    write<BFloat16>(sums, row, offset, width);
}

AddTerms select_add(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return add_float32;
        case DType::float16:
            return add_float16;
        case DType::bfloat16:
            return add_bfloat16;
    }
    throw std::invalid_argument("bank: unknown dtype");
}

Write select_write(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return write_float32;
        case DType::float16:
            return write_float16;
        case DType::bfloat16:
            return write_bfloat16;
    }
    throw std::invalid_argument("out: unknown dtype");
}

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

void validate(const CsrView& codes, const ConstMatrixView& bank, const MatrixView& out, float epsilon) {
    require(epsilon >= 0.0F, "epsilon: found a negative number or NaN; expected epsilon >= 0");
    require(bank.rows == codes.cols, "bank: found " + std::to_string(bank.rows) + " atoms; expected " +
                                         std::to_string(codes.cols) + ", one per column of codes");
    require(out.rows == codes.rows && out.cols == bank.cols,
            "out: found shape (" + std::to_string(out.rows) + ", " + std::to_string(out.cols) +
                "); expected (" + std::to_string(codes.rows) + ", " + std::to_string(bank.cols) + ")");
    require(codes.indptr[0] == 0 && codes.indptr[codes.rows] == codes.nnz,
            "codes: indptr must start at 0 and end at the number of stored entries");
    for (std::int64_t i = 0; i < codes.rows; ++i) {
        require(codes.indptr[i] <= codes.indptr[i + 1], "codes: indptr falls at row " + std::to_string(i));
    }
    for (std::int64_t k = 0; k < codes.nnz; ++k) {
        require(codes.indices[k] >= 0 && codes.indices[k] < codes.cols,
                "codes: found column " + std::to_string(codes.indices[k]) + "; expected 0 to " +
                    std::to_string(codes.cols - 1));
    }
}

}  // namespace

void compose(const CsrView& codes, const ConstMatrixView& bank, const MatrixView& out, float epsilon,
             int threads) {
    validate(codes, bank, out, epsilon);
    const AddTerms add = select_add(bank.dtype);
    const Write write_row = select_write(out.dtype);
    const auto* atoms = static_cast<const unsigned char*>(bank.data);
    auto* rows = static_cast<unsigned char*>(out.data);
    const auto atom_bytes = bank.cols * static_cast<std::int64_t>(size_of(bank.dtype));
    const auto row_bytes = out.cols * static_cast<std::int64_t>(size_of(out.dtype));

    // The entries that count, found once for all tiles.
    std::vector<Term> terms;
    std::vector<std::int64_t> starts{0};
    terms.reserve(static_cast<std::size_t>(codes.nnz));
    starts.reserve(static_cast<std::size_t>(codes.rows) + 1);
    for (std::int64_t i = 0; i < codes.rows; ++i) {
        for (std::int64_t k = codes.indptr[i]; k < codes.indptr[i + 1]; ++k) {
            if (std::fabs(codes.values[k]) < epsilon) continue;
            terms.push_back({atoms + codes.indices[k] * atom_bytes, codes.values[k]});
        }
        starts.push_back(static_cast<std::int64_t>(terms.size()));
    }

    const std::int64_t tiles = (bank.cols + tile_width - 1) / tile_width;
    parallel_for(tiles, threads, [&](std::int64_t tile) {
        alignas(64) float sums[tile_width];
        const std::int64_t offset = tile * tile_width;
        const std::int64_t width = std::min(tile_width, bank.cols - offset);
        for (std::int64_t i = 0; i < codes.rows; ++i) {
            std::fill(sums, sums + width, 0.0F);
            const std::int64_t start = starts[static_cast<std::size_t>(i)];
            const std::int64_t stop = starts[static_cast<std::size_t>(i) + 1];
            add(sums, terms.data() + start, stop - start, offset, width);
            write_row(sums, rows + i * row_bytes, offset, width);
        }
    });
}

}  // namespace globe
