// Compares layer_forward with the definition: dense and factored families, mixtures held, composed, or some
// of each.
#include "globe/layer.hpp"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

using globe::DType;
using globe::tests::check;

constexpr std::int64_t experts = 5, d = 70, p = 41, r = 19, atoms = 4;

std::size_t place(std::int64_t i) {
    return static_cast<std::size_t>(i);
}

std::vector<float> random_numbers(std::int64_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> found(place(count));
    for (float& number : found) number = normal(random) / 8;
    return found;
}

// The matrices of a family, and what they are: outputs x inputs of every expert.
struct Family {
    std::int64_t outputs, inputs;
    bool factored, turned;
    std::vector<float> matrices, bank, values{0.5F, 2.0F, 0.25F, 1.0F, 0.125F, 3.0F, -1.0F};
    std::vector<std::int64_t> indptr{0, 2, 3, 3, 5, 7};
    std::vector<std::int32_t> indices{0, 1, 3, 0, 2, 1, 3};
    std::vector<std::vector<float>> mixtures;
    std::vector<const void*> held;

    Family(std::int64_t rows, std::int64_t cols, bool is_factored, bool is_turned, unsigned seed)
        : outputs(rows), inputs(cols), factored(is_factored), turned(is_turned) {
        const std::int64_t high = factored && turned ? inputs : outputs, wide = factored ? r : inputs;
        matrices = random_numbers(experts * high * wide, seed);
        if (!factored) return;
        bank = random_numbers(atoms * r * width(), seed + 100);
        for (std::int64_t e = 0; e < experts; ++e) {
            std::vector<float> sum(place(r * width()));
            for (std::int64_t k = indptr[place(row(e))]; k < indptr[place(row(e) + 1)]; ++k) {
                for (std::int64_t i = 0; i < r * width(); ++i)
                    sum[place(i)] += values[place(k)] * bank[place(indices[place(k)] * r * width() + i)];
            }
            mixtures.push_back(sum);
        }
        for (const auto& mixture : mixtures) held.push_back(mixture.data());
    }

    std::int64_t width() const { return turned ? outputs : inputs; }
    static std::int64_t row(std::int64_t expert) { return 4 - expert; }

    globe::FamilyView view(bool with_mixtures) const {
        const std::int64_t high = factored && turned ? inputs : outputs, wide = factored ? r : inputs;
        globe::FamilyView made{{matrices.data(), high, wide, DType::float32}, high * wide};
        if (!factored) return made;
        made.atoms = {bank.data(), atoms, r * width(), DType::float32};
        made.codes = {indptr.data(), indices.data(), values.data(),
                      experts,       atoms,          static_cast<std::int64_t>(values.size())};
        made.first_row = 4;
        made.row_step = -1;
        if (with_mixtures) made.mixtures = held.data();
        return made;
    }

    double entry(std::int64_t expert, std::int64_t i, std::int64_t j) const {
        if (!factored) return matrices[place((expert * outputs + i) * inputs + j)];
        const std::int64_t left = turned ? j : i, right = turned ? i : j, high = turned ? inputs : outputs;
        double sum = 0.0;
        for (std::int64_t k = 0; k < r; ++k) {
            sum += static_cast<double>(matrices[place((expert * high + left) * r + k)]) *
                   static_cast<double>(mixtures[place(expert)][place(k * width() + right)]);
        }
        return sum;
    }

    std::vector<double> times(std::int64_t expert, const std::vector<double>& x) const {
        std::vector<double> found(place(outputs));
        for (std::int64_t i = 0; i < outputs; ++i) {
            for (std::int64_t j = 0; j < inputs; ++j) found[place(i)] += entry(expert, i, j) * x[place(j)];
        }
        return found;
    }
};

struct Problem {
    Family gate, up, down;
    std::int64_t tokens;
    std::vector<float> x;
    // One token goes to an expert twice, one to none, and expert 2 is of no atoms.
    std::vector<std::int64_t> picked{0, 1, 3, 2, 4, 4, 5, 9, 1, 0, 2, 3, 0, 5, 3, 1};
    std::vector<float> weights{0.5F, 1.0F, 2.0F, 0.25F, 1.0F, 0.5F, 7.0F, 9.0F,
                               1.0F, 1.0F, 3.0F, 0.5F,  2.0F, 1.0F, 1.0F, 1.0F};

    Problem(int factored, std::int64_t count)
        : gate(p, d, (factored & 1) != 0, false, 1),
          up(p, d, (factored & 2) != 0, false, 2),
          down(d, p, (factored & 4) != 0, true, 3),
          tokens(count),
          x(random_numbers(count * d, 4)) {
        while (static_cast<std::int64_t>(picked.size()) < 2 * count) {
            picked.push_back(picked[picked.size() - 7]);
            weights.push_back(weights[weights.size() - 5]);
        }
    }

    globe::LayerView view(bool held) const {
        return {gate.view(held), up.view(held), down.view(held), experts};
    }

    std::vector<float> forward(const globe::LayerView& layer, int threads) const {
        std::vector<float> out(place(tokens * d), -1.0F);
        globe::layer_forward(layer, {picked.data(), weights.data(), 2}, {x.data(), tokens, d, DType::float32},
                             {out.data(), tokens, d, DType::float32}, threads);
        return out;
    }

    std::vector<double> exact(std::int64_t t) const {
        const std::vector<double> token(x.begin() + t * d, x.begin() + (t + 1) * d);
        std::vector<double> sum(place(d));
        for (std::int64_t k = 2 * t; k < 2 * t + 2; ++k) {
            const std::int64_t expert = picked[place(k)];
            if (expert >= experts) continue;
            std::vector<double> hidden = gate.times(expert, token);
            const std::vector<double> other = up.times(expert, token);
            for (std::size_t i = 0; i < hidden.size(); ++i)
                hidden[i] *= other[i] / (1 + std::exp(-hidden[i]));
            const std::vector<double> made = down.times(expert, hidden);
            for (std::size_t i = 0; i < made.size(); ++i)
                sum[i] += static_cast<double>(weights[place(k)]) * made[i];
        }
        return sum;
    }
};

void matches_the_definition(int factored, std::int64_t tokens) {
    Problem problem(factored, tokens);
    std::vector<const void*> some[3] = {problem.gate.held, problem.up.held, problem.down.held};
    for (auto& held : some) {
        if (!held.empty()) held[1] = held[3] = nullptr;
    }
    globe::LayerView partly = problem.view(true);
    if (partly.gate.factored()) partly.gate.mixtures = some[0].data();
    if (partly.up.factored()) partly.up.mixtures = some[1].data();
    if (partly.down.factored()) partly.down.mixtures = some[2].data();
    for (const globe::LayerView& layer : {problem.view(false), problem.view(true), partly}) {
        const std::vector<float> out = problem.forward(layer, 1);
        check(out == problem.forward(layer, 3), "threads change nothing");
        check(out == problem.forward(partly, 1), "what is held changes nothing");
        double error = 0.0, size = 0.0;
        for (std::int64_t t = 0; t < tokens; ++t) {
            const std::vector<double> exact = problem.exact(t);
            for (std::int64_t i = 0; i < d; ++i) {
                const double found = out[place(t * d + i)];
                error += (found - exact[place(i)]) * (found - exact[place(i)]);
                size += exact[place(i)] * exact[place(i)];
            }
        }
        check(error <= 1e-10 * size,
              std::to_string(tokens) + " tokens, factored families " + std::to_string(factored));
        if (tokens > 1) {
            problem.tokens = 1;
            const std::vector<float> alone = problem.forward(layer, 1);
            check(std::equal(alone.begin(), alone.end(), out.begin()), "other tokens change nothing");
            problem.tokens = tokens;
        }
    }
}

template <class Change>
void rejects(const std::string& argument, const Change& change) {
    Problem problem(7, 3);
    globe::LayerView layer = problem.view(false);
    change(problem, layer);
    globe::tests::check_refused(argument, [&] { problem.forward(layer, 1); });
}

}  // namespace

int main() {
    globe::tests::on_every_isa([] {
        for (int factored = 0; factored < 8; ++factored) {
            for (const std::int64_t tokens : {0, 1, 2, 8, 27}) matches_the_definition(factored, tokens);
        }
    });
    rejects("experts", [](Problem& problem, globe::LayerView&) { problem.picked[3] = -1; });
    rejects("activation",
            [](Problem&, globe::LayerView& layer) { layer.activation = static_cast<globe::Activation>(4); });
    rejects("gate", [](Problem&, globe::LayerView& layer) { layer.gate.matrices.cols = r - 1; });
    rejects("up", [](Problem&, globe::LayerView& layer) { layer.up.atoms.cols -= 1; });
    rejects("down", [](Problem&, globe::LayerView& layer) { layer.down.matrices.rows = d; });
    rejects("codes", [](Problem& problem, globe::LayerView&) { problem.gate.indices[0] = atoms; });
    rejects("begin, end", [](Problem&, globe::LayerView& layer) { layer.up.first_row = 1; });
    return globe::tests::failures;
}
