// Compares experts with the definition, and looks after their promises: bits, allocations, threads, forks.
#include "globe/expert.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "tiny.hpp"

namespace {
std::atomic<std::int64_t> allocations{0};
}

// Not inlined, so that GCC does not take a pair of them for two that do not match.
__attribute__((noinline)) void* operator new(std::size_t bytes) {
    ++allocations;
    if (void* found = std::malloc(bytes)) return found;
    throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* pointer) noexcept {
    std::free(pointer);
}
__attribute__((noinline)) void operator delete(void* pointer, std::size_t /*bytes*/) noexcept {
    std::free(pointer);
}

namespace {

using globe::Family;
using globe::tests::check;
using globe::tests::hidden;
using globe::tests::width;

std::vector<float> random_tokens(std::int64_t count) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> tokens(static_cast<std::size_t>(count * hidden));
    for (auto& entry : tokens) entry = normal(random);
    return tokens;
}

std::vector<float> run(const globe::FactoredCheckpoint& opened, globe::ExpertId expert,
                       const std::vector<float>& tokens, const globe::ExpertOptions& options = {}) {
    const auto count = static_cast<std::int64_t>(tokens.size()) / hidden;
    std::vector<float> out(tokens.size(), -1.0F);
    std::vector<unsigned char> workspace(globe::expert_workspace(opened, count, options.threads));
    globe::expert_forward(opened, expert, {tokens.data(), count, hidden, globe::DType::float32},
                          {out.data(), count, hidden, globe::DType::float32},
                          {workspace.data(), workspace.size()}, options);
    return out;
}

float number(const void* data, std::int64_t place) {
    const std::uint32_t wide = static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(data)[place])
                               << 16;
    float value = 0.0F;
    std::memcpy(&value, &wide, 4);
    return value;
}

// W, rows x cols, in double.
std::vector<double> dense(const globe::FactoredCheckpoint& opened, Family family, globe::ExpertId expert) {
    const auto& matrix = opened.matrix(family, expert.layer, expert.expert);
    const auto& stored = matrix.stored;
    std::vector<double> found;
    if (!matrix.factored()) {
        for (std::int64_t i = 0; i < stored.rows * stored.cols; ++i) found.push_back(number(stored.data, i));
        return found;
    }
    const globe::Bank& bank = opened.banks()[static_cast<std::size_t>(matrix.bank)];
    for (std::int64_t i = 0; i < stored.rows; ++i) {
        for (std::int64_t t = 0; t < bank.width; ++t) {
            double sum = 0.0;
            for (std::int64_t k = 0; k < bank.rank; ++k) {
                for (auto e = bank.codes.indptr[matrix.row]; e < bank.codes.indptr[matrix.row + 1]; ++e) {
                    const std::int64_t atom = bank.codes.indices[e] * bank.rank * bank.width;
                    sum += static_cast<double>(number(stored.data, i * stored.cols + k)) *
                           bank.codes.values[e] * number(bank.atoms.data, atom + k * bank.width + t);
                }
            }
            found.push_back(sum);
        }
    }
    return found;
}

double activated(double x, globe::Activation activation) {
    switch (activation) {
        case globe::Activation::silu:
            return x / (1.0 + std::exp(-x));
        case globe::Activation::gelu:
            return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
        case globe::Activation::gelu_tanh:
            return 0.5 * x *
                   (1.0 + std::tanh(std::sqrt(2.0 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
        case globe::Activation::relu:
            return std::max(x, 0.0);
    }
    return 0.0;
}

void matches_the_definition(const globe::FactoredCheckpoint& opened, globe::Activation activation) {
    const auto tokens = random_tokens(3);
    for (std::int64_t e = 0; e < opened.experts(1); ++e) {
        const globe::ExpertId expert{1, e};
        const auto gate = dense(opened, Family::gate, expert), up = dense(opened, Family::up, expert);
        const auto down = dense(opened, Family::down, expert);
        globe::ExpertOptions options;
        options.activation = activation;
        const auto found = run(opened, expert, tokens, options);
        for (std::int64_t t = 0; t < 3; ++t) {
            std::vector<double> expected(hidden, 0.0), size(hidden, 0.0);
            for (std::int64_t i = 0; i < width; ++i) {
                double g = 0.0, u = 0.0;
                for (std::int64_t k = 0; k < hidden; ++k) {
                    const double x = tokens[static_cast<std::size_t>(t * hidden + k)];
                    g += gate[static_cast<std::size_t>(i * hidden + k)] * x;
                    u += up[static_cast<std::size_t>(i * hidden + k)] * x;
                }
                for (std::int64_t o = 0; o < hidden; ++o) {
                    const double term =
                        down[static_cast<std::size_t>(o * width + i)] * activated(g, activation) * u;
                    expected[static_cast<std::size_t>(o)] += term;
                    size[static_cast<std::size_t>(o)] += std::fabs(term);
                }
            }
            for (std::size_t o = 0; o < hidden; ++o) {
                const double off = found[static_cast<std::size_t>(t) * hidden + o] - expected[o];
                check(std::fabs(off) <= 1e-5 * (1.0 + size[o]),
                      "expert " + std::to_string(e) + ", entry " + std::to_string(o) + ", activation " +
                          std::to_string(static_cast<int>(activation)));
            }
        }
    }
}

// Threads, a cache and the other tokens change nothing; 300 tokens are more than one round.
void keeps_its_bits(const globe::FactoredCheckpoint& opened) {
    const auto tokens = random_tokens(300);
    globe::ExpertCache all, none(0);
    globe::ExpertOptions plain, threads, cached, uncached;
    plain.threads = cached.threads = uncached.threads = 1;
    threads.threads = 2;
    cached.cache = &all;
    uncached.cache = &none;
    const auto found = run(opened, {0, 2}, tokens, plain);
    check(found == run(opened, {0, 2}, tokens, threads), "threads change nothing");
    check(found == run(opened, {0, 2}, tokens, cached), "a cache changes nothing");
    check(found == run(opened, {0, 2}, tokens, cached), "nor what it holds");
    check(found == run(opened, {0, 2}, tokens, uncached), "nor one that holds nothing");
    check(all.stats().hits == 10 && all.stats().misses == 2 && none.stats().entries == 0,
          "what the caches counted");
    const std::size_t last = tokens.size() - hidden;
    const std::vector<float> one(tokens.begin() + static_cast<std::ptrdiff_t>(last), tokens.end());
    const std::vector<float> alone = run(opened, {0, 2}, one, plain);
    check(std::equal(alone.begin(), alone.end(), found.begin() + static_cast<std::ptrdiff_t>(last)),
          "a token alone has the same bits");
}

void allocates_nothing(const globe::FactoredCheckpoint& opened) {
    const auto tokens = random_tokens(9);
    std::vector<float> out(tokens.size());
    for (const int threads : {1, 2}) {
        std::vector<unsigned char> workspace(globe::expert_workspace(opened, 9, threads));
        globe::ExpertOptions options;
        options.threads = threads;
        std::int64_t before = 0;
        for (int round = 0; round < 2; ++round) {  // the first one may start threads
            before = allocations;
            globe::expert_forward(opened, {1, 0}, {tokens.data(), 9, hidden, globe::DType::float32},
                                  {out.data(), 9, hidden, globe::DType::float32},
                                  {workspace.data(), workspace.size()}, options);
        }
        const std::int64_t made = allocations - before;
        check(made == 0, std::to_string(made) + " allocations");
    }
}

void refuses_arguments(const globe::FactoredCheckpoint& opened) {
    const auto tokens = random_tokens(2);
    std::vector<float> out(tokens.size());
    std::vector<unsigned char> workspace(globe::expert_workspace(opened, 2, 1));
    globe::ExpertOptions options;
    options.threads = 1;
    const auto call = [&](globe::ConstMatrixView x, globe::MatrixView y, std::size_t bytes,
                          std::int64_t layer) {
        globe::expert_forward(opened, {layer, 0}, x, y, {workspace.data(), bytes}, options);
    };
    const globe::ConstMatrixView x{tokens.data(), 2, hidden, globe::DType::float32};
    const globe::MatrixView y{out.data(), 2, hidden, globe::DType::float32};
    const std::size_t enough = workspace.size();
    using globe::tests::check_refused;
    check_refused("tokens", [&] { call({tokens.data(), 2, 6, globe::DType::float32}, y, enough, 0); });
    check_refused("tokens", [&] { call({nullptr, 2, 7, globe::DType::float32}, y, enough, 0); });
    check_refused("out", [&] { call(x, {out.data(), 1, 7, globe::DType::float32}, enough, 0); });
    check_refused("out", [&] { call({out.data(), 2, 7, globe::DType::float32}, y, enough, 0); });
    check_refused("out", [&] { call(x, {out.data(), 2, 7, globe::DType::float32, 5}, enough, 0); });
    check_refused("workspace", [&] { call(x, y, enough - 1, 0); });
    check_refused("layer", [&] { call(x, y, enough, 5); });
    options.activation = static_cast<globe::Activation>(9);
    check_refused("activation", [&] { call(x, y, enough, 0); });
    options.activation = globe::Activation::relu;
    call({nullptr, 0, hidden, globe::DType::float32}, {nullptr, 0, hidden, globe::DType::float32}, enough, 0);
}

// The least recently used makes room, and what is above the budget is not kept.
void evicts(const globe::FactoredCheckpoint& opened) {
    const std::size_t one = 4 * 28;
    globe::ExpertCache cache(2 * one + 1);
    const auto get = [&](std::int64_t expert) {
        return cache.get(opened, opened.matrix(Family::gate, 0, expert), 1);
    };
    const auto first = get(0);
    get(1);
    get(0);
    get(2);
    const auto keys = cache.keys();
    check(keys.size() == 2 && keys[0].row == 0 && keys[1].row == 2, "the least recently used goes");
    check(cache.stats().evictions == 1 && cache.stats().hits == 1 && cache.stats().misses == 3, "counts");
    check(cache.stats().bytes == 2 * one, "bytes");
    cache.resize(one - 1);
    check(cache.stats().entries == 0 && cache.stats().bytes == 0, "a smaller budget");
    check(get(1) != nullptr && cache.stats().entries == 0, "above the budget is not kept");
    check(view(*first).rows == globe::tests::rank, "what was handed out lives on");
    cache.clear();
    check(cache.stats().misses == 0 && cache.stats().budget == one - 1, "cleared");
    globe::tests::check_refused("matrix", [&] { cache.get(opened, opened.matrix(Family::down, 0, 0), 1); });
    globe::ExpertCache halves(globe::ExpertCache::unlimited, globe::DType::bfloat16);
    halves.get(opened, opened.matrix(Family::gate, 0, 0), 1);
    check(halves.stats().bytes == one / 2, "bfloat16 takes half");
}

void serves_many_threads(const globe::FactoredCheckpoint& opened) {
    const auto tokens = random_tokens(4);
    globe::ExpertCache cache(4 * 28 * 3);
    std::vector<std::vector<float>> expected;
    for (std::int64_t e = 0; e < 6; ++e) expected.push_back(run(opened, {e / 3, e % 3}, tokens));
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 8; ++thread) {
        threads.emplace_back([&, thread] {
            globe::ExpertOptions options;
            options.cache = &cache;
            for (int round = 0; round < 40; ++round) {
                const std::int64_t e = (round * 5 + thread) % 6;
                wrong +=
                    run(opened, {e / 3, e % 3}, tokens, options) != expected[static_cast<std::size_t>(e)];
                if (round % 16 == thread) cache.resize(4 * 28 * static_cast<std::size_t>(round % 5));
                if (round % 32 == thread) cache.clear();
            }
        });
    }
    for (auto& thread : threads) thread.join();
    check(wrong == 0, "eight threads share a checkpoint and a cache");
}

[[maybe_unused]] void survives_a_fork(const globe::FactoredCheckpoint& opened) {
    const auto tokens = random_tokens(40);
    const auto expected = run(opened, {0, 0}, tokens);
    const pid_t child = fork();
    if (child == 0) _exit(run(opened, {0, 0}, tokens) == expected ? 0 : 1);
    int status = -1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child goes on");
}

}  // namespace

int main() {
    const globe::tests::Written directory(globe::tests::tiny_directory());
    const globe::FactoredCheckpoint opened(directory.path());
    globe::tests::on_every_isa([&] {
        for (const int activation : {0, 1, 2, 3}) {
            matches_the_definition(opened, static_cast<globe::Activation>(activation));
        }
        keeps_its_bits(opened);
    });
    allocates_nothing(opened);
    refuses_arguments(opened);
    evicts(opened);
    serves_many_threads(opened);
#if !defined(__SANITIZE_THREAD__)  // it does not follow a fork of a process with threads
    survives_a_fork(opened);
#endif
    return globe::tests::result();
}
