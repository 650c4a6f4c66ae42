// Compares gram with the definition, on every instruction set that runs here.
#include "globe/gram.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "globe/isa.hpp"

namespace {

int failures = 0;

void check(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
}

std::uint16_t to_bfloat16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>(bits >> 16);
}

float from_bfloat16(std::uint16_t value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Vectors in rows a stride apart, in both dtypes with the same values.
struct Vectors {
    std::int64_t n, k, stride;
    std::vector<float> single;
    std::vector<std::uint16_t> half;

    Vectors(std::int64_t rows, std::int64_t cols) : n(rows), k(cols), stride(cols + 3) {
        std::mt19937 random(static_cast<unsigned>(rows + cols));
        std::normal_distribution<float> normal(0.3F);
        for (std::int64_t i = 0; i < n * stride; ++i) {
            half.push_back(to_bfloat16(normal(random)));
            single.push_back(from_bfloat16(half.back()));
        }
    }
    globe::ConstMatrixView view(bool as_half) const {
        if (as_half) return {half.data(), n, k, globe::DType::bfloat16, stride};
        return {single.data(), n, k, globe::DType::float32, stride};
    }
};

void matches_the_definition(std::int64_t n, std::int64_t k, bool as_half, bool weighted) {
    const Vectors vectors(n, k);
    std::vector<float> weights(static_cast<std::size_t>(k));
    for (std::int64_t t = 0; t < k; ++t) weights[t] = weighted ? static_cast<float>(t % 4) : 1.0F;
    const float* given = weighted ? weights.data() : nullptr;
    const auto size = static_cast<std::size_t>(n * n);
    std::vector<double> one(size, 1.0), many(size, 1.0), rows(size, 1.0);
    globe::gram_add(vectors.view(as_half), one.data(), given, 1);
    globe::gram_add(vectors.view(as_half), many.data(), given, 3);
    globe::gram_add_rows(vectors.view(as_half), rows.data(), 0, n / 3, given);
    globe::gram_add_rows(vectors.view(as_half), rows.data(), n / 3, n, given);
    for (auto* matrix : {&one, &many, &rows}) globe::gram_mirror(matrix->data(), n);
    const std::string what = globe::active_isa() + ", n " + std::to_string(n) + ", k " + std::to_string(k) +
                             (as_half ? ", bfloat16" : ", float32") + (weighted ? ", weighted" : "");
    check(one == many, "threads change nothing: " + what);
    check(one == rows, "row ranges change nothing: " + what);
    double difference = 0.0, norm = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
            double expected = 1.0;
            for (std::int64_t t = 0; t < k; ++t) {
                expected += static_cast<double>(vectors.single[i * vectors.stride + t]) *
                            vectors.single[j * vectors.stride + t] * weights[t];
            }
            difference += std::pow(one[i * n + j] - expected, 2.0);
            norm += expected * expected;
        }
    }
    check(std::sqrt(difference / norm) <= 1e-6, what);
}

// In one row of one block, for which the instructions for bfloat16 do not serve.
void keeps_subnormal_numbers(std::int64_t place) {
    Vectors vectors(70, 1061);
    std::fill(vectors.half.begin(), vectors.half.end(), to_bfloat16(0x1p20F));
    vectors.half[69 * vectors.stride + place] = 1;  // 2^-133
    for (std::int64_t t = 0; t < vectors.k; ++t) {
        if (t != place) vectors.half[69 * vectors.stride + t] = 0;
    }
    std::vector<double> one(70 * 70), rows(70 * 70);
    globe::gram_add(vectors.view(true), one.data(), nullptr, 2);
    globe::gram_add_rows(vectors.view(true), rows.data(), 0, 40);
    globe::gram_add_rows(vectors.view(true), rows.data(), 40, 70);
    for (auto* matrix : {&one, &rows}) globe::gram_mirror(matrix->data(), 70);
    const std::string what = globe::active_isa() + ", subnormal at column " + std::to_string(place);
    check(one[69 * 70 + 3] == 0x1p-113, what);
    check(one == rows, "row ranges change nothing: " + what);
}

void rejects(const std::string& argument, const float* weights, std::int64_t begin, std::int64_t end) {
    const Vectors vectors(4, 5);
    std::vector<double> gram(16);
    try {
        globe::gram_add_rows(vectors.view(false), gram.data(), begin, end, weights);
        check(false, "no error for " + argument);
    } catch (const std::invalid_argument& error) {
        check(std::string(error.what()).rfind(argument, 0) == 0, std::string("message: ") + error.what());
    }
}

}  // namespace

int main() {
    for (const auto& isa : globe::runnable_isas()) {
        globe::use_isa(isa);
        for (const std::int64_t place : {5, 1023, 1060}) keeps_subnormal_numbers(place);
        for (const bool as_half : {false, true}) {
            for (const bool weighted : {false, true}) {
                matches_the_definition(1, 1, as_half, weighted);
                matches_the_definition(31, 64, as_half, weighted);
                matches_the_definition(70, 1061, as_half, weighted);
            }
        }
    }
    const std::vector<float> good(5, 1.0F);
    const std::vector<float> negative{1, 1, -1, 1, 1};
    const std::vector<float> nan{1, 1, std::numeric_limits<float>::quiet_NaN(), 1, 1};
    rejects("weights:", negative.data(), 0, 4);
    rejects("weights:", nan.data(), 0, 4);
    rejects("begin, end:", good.data(), 2, 5);
    rejects("begin, end:", good.data(), 3, 2);
    return failures == 0 ? 0 : 1;
}
