// Compares compose_matmul with the definition, entry by entry.
#include "globe/compose_matmul.hpp"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

using globe::tests::check;

constexpr std::int64_t mixtures = 3, atoms = 4;

struct Problem {
    std::int64_t tokens, height, width;
    std::vector<std::int64_t> indptr{0, 3, 3, 6}, rows;  // the second mixture is of nothing
    std::vector<std::int32_t> indices{0, 1, 3, 0, 2, 3};
    std::vector<float> values{0.5F, 2.0F, 0.25F, 1.0F, 0.125F, 3.0F}, bank, x;

    Problem(std::int64_t count, std::int64_t r, std::int64_t d) : tokens(count), height(r), width(d) {
        std::mt19937 random(11);
        std::normal_distribution<float> normal;
        for (std::int64_t i = 0; i < atoms * r * d; ++i) bank.push_back(normal(random));
        for (std::int64_t i = 0; i < count * d; ++i) x.push_back(normal(random));
        for (std::int64_t t = 0; t < count; ++t) rows.push_back(t % 7 == 1 ? 1 : t % 5 == 2 ? 0 : 2);
    }

    void multiply(std::vector<float>& out, int threads) const {
        const globe::CsrView codes{indptr.data(), indices.data(), values.data(),
                                   mixtures,      atoms,          static_cast<std::int64_t>(indices.size())};
        globe::compose_matmul(codes, {bank.data(), atoms, height * width, globe::DType::float32}, rows.data(),
                              {x.data(), tokens, width, globe::DType::float32},
                              {out.data(), tokens, height, globe::DType::float32}, threads);
    }

    double exact(std::int64_t token, std::int64_t row) const {
        const auto place = [](std::int64_t i) { return static_cast<std::size_t>(i); };
        const std::int64_t mixture = rows[place(token)];
        double sum = 0.0;
        for (auto k = indptr[place(mixture)]; k < indptr[place(mixture + 1)]; ++k) {
            for (std::int64_t c = 0; c < width; ++c) {
                const std::int64_t entry = (indices[place(k)] * height + row) * width + c;
                sum += static_cast<double>(values[place(k)]) * static_cast<double>(bank[place(entry)]) *
                       static_cast<double>(x[place(token * width + c)]);
            }
        }
        return sum;
    }
};

void matches_the_definition(const Problem& problem) {
    std::vector<float> out(static_cast<std::size_t>(problem.tokens * problem.height), -1.0F), again(out);
    problem.multiply(out, 1);
    problem.multiply(again, 3);
    check(out == again, "threads change nothing");
    double error = 0.0, size = 0.0;
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
        for (std::int64_t i = 0; i < problem.height; ++i) {
            const double exact = problem.exact(t, i);
            const double found = out[static_cast<std::size_t>(t * problem.height + i)];
            error += (found - exact) * (found - exact);
            size += exact * exact;
        }
    }
    check(error <= 1e-10 * size, std::to_string(problem.tokens) + " tokens, " +
                                     std::to_string(problem.height) + " x " + std::to_string(problem.width));
}

void rejects(const std::string& argument, const Problem& problem) {
    std::vector<float> out(static_cast<std::size_t>(problem.tokens * problem.height));
    globe::tests::check_refused(argument, [&] { problem.multiply(out, 1); });
}

}  // namespace

int main() {
    globe::tests::on_every_isa([] {
        for (const std::int64_t tokens : {0, 1, 6, 40, 80}) {
            for (const std::int64_t height : {1, 24, 31}) {
                for (const std::int64_t width : {1, 40, 512, 700})
                    matches_the_definition({tokens, height, width});
            }
        }
    });
    Problem problem(2, 3, 4);
    problem.rows[1] = mixtures;
    rejects("rows", problem);
    problem.rows[1] = -1;
    rejects("rows", problem);
    problem.rows[1] = 0;
    problem.indices[2] = atoms;
    rejects("codes", problem);
    problem.indices[2] = 0;
    problem.indptr[1] = 7;
    rejects("codes", problem);
    return globe::tests::result();
}
