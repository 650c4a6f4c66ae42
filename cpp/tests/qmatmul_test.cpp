// Compares qmatmul with the definition, entry by entry.
#include "globe/qmatmul.hpp"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

using globe::tests::check;

struct Problem {
    std::int64_t tokens, rows, cols, groups;
    int bits;
    std::vector<float> x, scales;
    std::vector<std::int32_t> words;

    Problem(std::int64_t n, std::int64_t p, std::int64_t count, std::int64_t group, int width)
        : tokens(n), rows(p), cols(count * group), groups(count), bits(width) {
        std::mt19937 random(3);
        std::normal_distribution<float> normal;
        for (std::int64_t i = 0; i < n * cols; ++i) x.push_back(normal(random));
        for (std::int64_t i = 0; i < p * groups; ++i) scales.push_back(normal(random));
        for (std::int64_t i = 0; i < p * cols * bits / 32; ++i)
            words.push_back(static_cast<std::int32_t>(random()));
    }

    void multiply(std::vector<float>& out, int threads) const {
        globe::qmatmul({x.data(), tokens, cols, globe::DType::float32}, {words.data(), rows, cols, bits},
                       {scales.data(), rows, groups, globe::DType::float32},
                       {out.data(), tokens, rows, globe::DType::float32}, threads);
    }

    double weight(std::int64_t i, std::int64_t k) const {
        const std::int64_t place = i * cols + k, in_word = 32 / bits;
        const auto word = static_cast<std::uint32_t>(words[static_cast<std::size_t>(place / in_word)]);
        const std::uint32_t q = word >> (bits * (place % in_word)) & ((1U << bits) - 1U);
        const float scale = scales[static_cast<std::size_t>(i * groups + k / (cols / groups))];
        return (static_cast<double>(q) - (1 << (bits - 1))) * static_cast<double>(scale);
    }
};

void matches_the_definition(const Problem& problem) {
    std::vector<float> out(static_cast<std::size_t>(problem.tokens * problem.rows), -1.0F), again(out);
    problem.multiply(out, 1);
    problem.multiply(again, 3);
    check(out == again, "threads change nothing");
    double error = 0.0, size = 0.0;
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
        for (std::int64_t i = 0; i < problem.rows; ++i) {
            double exact = 0.0;
            for (std::int64_t k = 0; k < problem.cols; ++k) {
                const double term =
                    problem.weight(i, k) *
                    static_cast<double>(problem.x[static_cast<std::size_t>(t * problem.cols + k)]);
                exact += term;
                size += term * term;
            }
            const double found = out[static_cast<std::size_t>(t * problem.rows + i)];
            error += (found - exact) * (found - exact);
        }
    }
    check(error <= 1e-8 * size, std::to_string(problem.tokens) + " tokens, " + std::to_string(problem.rows) +
                                    " rows, " + std::to_string(problem.cols) + " columns, " +
                                    std::to_string(problem.bits) + " bits");
}

void rejects(const std::string& argument, Problem problem) {
    std::vector<float> out(static_cast<std::size_t>(problem.tokens * problem.rows));
    globe::tests::check_refused(argument, [&] { problem.multiply(out, 1); });
}

}  // namespace

int main() {
    globe::tests::on_every_isa([] {
        for (const int bits : {4, 8}) {
            for (const std::int64_t tokens : {0, 1, 2, 5, 30}) {
                for (const std::int64_t group : {8, 32, 72, 256}) {
                    for (const std::int64_t rows : {0, 1, 33, 64})
                        matches_the_definition({tokens, rows, 5, group, bits});
                }
            }
        }
    });
    Problem problem(2, 3, 2, 32, 4);
    problem.bits = 3;
    rejects("bits", problem);
    problem.bits = 4;
    problem.groups = 3;
    rejects("scales", problem);
    problem.groups = 0;
    rejects("scales", problem);
    problem.groups = 16;
    rejects("scales", problem);
    problem.groups = 2;
    problem.cols = 63;
    rejects("weights", problem);
    rejects("scales", Problem(1, 2, 1, 264, 4));
    return globe::tests::result();
}
