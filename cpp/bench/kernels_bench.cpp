// Every kernel at the sizes of full models, by google-benchmark: on the thread that calls, with the rate of
// its arithmetic and of the bytes that it cannot do without.
//
//     cmake --preset default -DGLOBE_BENCHMARKS=ON && cmake --build build/default
//     build/default/kernels_bench --benchmark_filter=gram --benchmark_repetitions=5
#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "globe/globe.hpp"

namespace {

using globe::DType;

constexpr int one_thread = 1;

std::mt19937& source() {
    static std::mt19937 random(7);
    return random;
}

template <class T = float>
std::vector<T> normal(std::int64_t count) {
    std::normal_distribution<float> values;
    std::vector<T> found(static_cast<std::size_t>(count));
    for (auto& value : found) {
        const float drawn = values(source());
        if constexpr (std::is_same_v<T, std::uint16_t>) {
            std::uint32_t bits;
            std::memcpy(&bits, &drawn, sizeof bits);
            value = static_cast<std::uint16_t>(bits >> 16);
        } else {
            value = static_cast<T>(drawn);
        }
    }
    return found;
}

void set_rates(benchmark::State& state, double operations, double bytes) {
    const auto times = static_cast<double>(state.iterations());
    state.counters["flop/s"] = benchmark::Counter(operations * times, benchmark::Counter::kIsRate);
    state.counters["bytes/s"] = benchmark::Counter(bytes * times, benchmark::Counter::kIsRate);
}

// n vectors of k numbers.
template <class T>
void gram(benchmark::State& state) {
    const auto n = state.range(0), k = state.range(1);
    const auto dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
    const auto vectors = normal<T>(n * k);
    std::vector<double> total(static_cast<std::size_t>(n * n));
    for (auto _ : state) {
        globe::gram_add({vectors.data(), n, k, dtype}, total.data(), nullptr, one_thread);
        benchmark::DoNotOptimize(total.data());
    }
    const auto rows = static_cast<double>(n), columns = static_cast<double>(k);
    set_rates(state, rows * (rows + 1) * columns, rows * columns * sizeof(T));
}
BENCHMARK(gram<float>)->Args({180, 65536})->Args({1440, 16384})->Unit(benchmark::kMillisecond);
BENCHMARK(gram<std::uint16_t>)->Args({180, 65536})->Args({1440, 16384})->Unit(benchmark::kMillisecond);

// 64 targets on m atoms, whose best codes have some twelve of them.
void nnls(benchmark::State& state) {
    const std::int64_t m = state.range(0), n = 64, width = 2 * m;
    const auto atoms = normal<double>(m * width);
    std::vector<double> gram(static_cast<std::size_t>(m * m)), correlations(static_cast<std::size_t>(n * m));
    for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = 0; j < m; ++j) {
            double sum = 0.0;
            for (std::int64_t c = 0; c < width; ++c)
                sum += atoms[static_cast<std::size_t>(i * width + c)] *
                       atoms[static_cast<std::size_t>(j * width + c)];
            gram[static_cast<std::size_t>(i * m + j)] = sum;
        }
    }
    for (std::int64_t row = 0; row < n; ++row) {
        for (int picked = 0; picked < 12; ++picked) {
            const auto atom = static_cast<std::int64_t>(source()() % static_cast<std::uint32_t>(m));
            for (std::int64_t j = 0; j < m; ++j)
                correlations[static_cast<std::size_t>(row * m + j)] +=
                    gram[static_cast<std::size_t>(atom * m + j)];
        }
    }
    std::vector<double> codes(static_cast<std::size_t>(n * m));
    for (auto _ : state) {
        globe::nnls({gram.data(), correlations.data(), m, n}, {}, {codes.data(), nullptr, nullptr, nullptr},
                    one_thread);
        benchmark::DoNotOptimize(codes.data());
    }
    state.SetItemsProcessed(state.iterations() * n);
}
BENCHMARK(nnls)->Arg(64)->Arg(256)->Unit(benchmark::kMillisecond);

// 1,440 rows of m logits, forwards and back.
template <class T>
void entmax(benchmark::State& state) {
    const std::int64_t n = 1440, m = state.range(0);
    const auto logits = normal<T>(n * m), gradient = normal<T>(n * m);
    std::vector<T> found(logits.size()), back(logits.size());
    for (auto _ : state) {
        globe::entmax<T>({logits.data(), n, m}, {found.data(), n, m}, {}, one_thread);
        globe::entmax_backward<T>({found.data(), n, m}, {gradient.data(), n, m}, {back.data(), n, m}, {},
                                  one_thread);
        benchmark::DoNotOptimize(back.data());
    }
    state.SetItemsProcessed(state.iterations() * n);
}
BENCHMARK(entmax<float>)->Arg(64)->Arg(180)->Unit(benchmark::kMicrosecond);
BENCHMARK(entmax<double>)->Arg(64)->Arg(180)->Unit(benchmark::kMicrosecond);

// `support` atoms of `atoms`, of 704 x 2,048 numbers in bf16, for each of `mixtures`.
struct Mixtures {
    static constexpr std::int64_t height = 704, width = 2048, atoms = 24, support = 12;
    std::vector<std::uint16_t> bank = normal<std::uint16_t>(atoms * height * width);
    std::vector<std::int64_t> indptr{0};
    std::vector<std::int32_t> indices;
    std::vector<float> values;

    explicit Mixtures(std::int64_t count) {
        for (std::int64_t row = 0; row < count; ++row) {
            for (std::int64_t atom = 0; atom < support; ++atom) {
                indices.push_back(static_cast<std::int32_t>(2 * atom + row % 2));
                values.push_back(1.0F / support);
            }
            indptr.push_back(static_cast<std::int64_t>(indices.size()));
        }
    }
    globe::CsrView codes() const {
        const auto count = static_cast<std::int64_t>(indptr.size()) - 1;
        return {indptr.data(), indices.data(), values.data(),
                count,         atoms,          static_cast<std::int64_t>(indices.size())};
    }
    static constexpr double bytes = 2.0 * support * height * width;  // of the atoms of one mixture
};

void compose(benchmark::State& state) {
    const Mixtures mixtures(state.range(0));
    const auto length = Mixtures::height * Mixtures::width;
    std::vector<std::uint16_t> out(static_cast<std::size_t>(state.range(0) * length));
    for (auto _ : state) {
        globe::compose(mixtures.codes(), {mixtures.bank.data(), Mixtures::atoms, length, DType::bfloat16},
                       {out.data(), state.range(0), length, DType::bfloat16}, 0.0F, one_thread);
        benchmark::DoNotOptimize(out.data());
    }
    const auto each = static_cast<double>(state.range(0));
    set_rates(state, Mixtures::bytes * each, (Mixtures::bytes + 2.0 * static_cast<double>(length)) * each);
}
BENCHMARK(compose)->Arg(1)->Arg(2)->Unit(benchmark::kMillisecond);

void compose_matmul(benchmark::State& state) {
    const Mixtures mixtures(1);
    const auto tokens = state.range(0);
    const auto x = normal<std::uint16_t>(tokens * Mixtures::width);
    const std::vector<std::int64_t> rows(static_cast<std::size_t>(tokens), 0);
    std::vector<std::uint16_t> out(static_cast<std::size_t>(tokens * Mixtures::height));
    for (auto _ : state) {
        globe::compose_matmul(
            mixtures.codes(),
            {mixtures.bank.data(), Mixtures::atoms, Mixtures::height * Mixtures::width, DType::bfloat16},
            rows.data(), {x.data(), tokens, Mixtures::width, DType::bfloat16},
            {out.data(), tokens, Mixtures::height, DType::bfloat16}, one_thread);
        benchmark::DoNotOptimize(out.data());
    }
    const double product = 2.0 * static_cast<double>(tokens * Mixtures::height * Mixtures::width);
    set_rates(state, Mixtures::bytes + product, Mixtures::bytes);
}
BENCHMARK(compose_matmul)->Arg(1)->Arg(16)->Arg(64)->Arg(256)->Unit(benchmark::kMillisecond);

// 1,408 x 704 weights of `bits` bits in groups of 64.
void qmatmul(benchmark::State& state) {
    const std::int64_t height = 1408, width = 704, groups = width / 64;
    const auto bits = static_cast<int>(state.range(0));
    const auto tokens = state.range(1);
    std::vector<std::int32_t> words(static_cast<std::size_t>(height * width * bits / 32));
    for (auto& word : words) word = static_cast<std::int32_t>(source()());
    const auto scales = normal<std::uint16_t>(height * groups), x = normal<std::uint16_t>(tokens * width);
    std::vector<std::uint16_t> out(static_cast<std::size_t>(tokens * height));
    for (auto _ : state) {
        globe::qmatmul({x.data(), tokens, width, DType::bfloat16}, {words.data(), height, width, bits},
                       {scales.data(), height, groups, DType::bfloat16},
                       {out.data(), tokens, height, DType::bfloat16}, one_thread);
        benchmark::DoNotOptimize(out.data());
    }
    set_rates(state, 2.0 * static_cast<double>(tokens * height * width),
              4.0 * static_cast<double>(words.size()));
}
BENCHMARK(qmatmul)->ArgsProduct({{4, 8}, {1, 16, 256}})->Unit(benchmark::kMicrosecond);

}  // namespace

BENCHMARK_MAIN();
