// Compares entmax and its derivative with their definitions, row by row.
#include "globe/entmax.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

using globe::tests::check;
using globe::tests::check_refused;

constexpr double infinity = std::numeric_limits<double>::infinity();

template <class T>
using Numbers = std::vector<T>;

template <class T>
globe::RowsView<const T> view(const Numbers<T>& numbers, std::int64_t cols) {
    return {numbers.data(), static_cast<std::int64_t>(numbers.size()) / cols, cols};
}

template <class T>
globe::RowsView<T> view(Numbers<T>& numbers, std::int64_t cols) {
    return {numbers.data(), static_cast<std::int64_t>(numbers.size()) / cols, cols};
}

// Of every scale, with ties and -inf; the first of each row is finite.
template <class T>
Numbers<T> logits(std::int64_t rows, std::int64_t cols, std::mt19937& random) {
    std::normal_distribution<double> normal;
    Numbers<T> z(static_cast<std::size_t>(rows * cols));
    for (std::size_t i = 0; i < z.size(); ++i) {
        const auto row = static_cast<std::int64_t>(i) / cols;
        double value = normal(random) * std::pow(4.0, static_cast<double>(row) - 2.0);
        if (row == 1) value = std::round(2.0 * value) / 2.0;
        if (row == 2 && i % static_cast<std::size_t>(cols) != 0 && value < 0.0) value = -infinity;
        z[i] = static_cast<T>(value);
    }
    return z;
}

template <class T>
Numbers<T> gradient(const Numbers<T>& y, std::mt19937& random) {
    std::normal_distribution<double> normal;
    Numbers<T> dy(y.size());
    for (std::size_t i = 0; i < dy.size(); ++i) {
        const double value = normal(random);
        dy[i] = static_cast<T>(y[i] > T(0) ? value : std::nan(""));  // not to be looked at
    }
    return dy;
}

// By bisection on the threshold, in double.
template <class T>
Numbers<double> by_definition(const T* z, std::int64_t cols, const globe::EntmaxOptions& options) {
    const double power = 1.0 / (options.alpha - 1.0), scale = (options.alpha - 1.0) / options.temperature;
    const double top = *std::max_element(z, z + cols);
    Numbers<double> p(static_cast<std::size_t>(cols));
    double low = 0.0, high = 1.0, sum = 0.0;  // of 1 + threshold
    for (int step = 0; step < 80; ++step) {
        const double middle = 0.5 * (low + high);
        sum = 0.0;
        for (std::int64_t i = 0; i < cols; ++i) {
            const double less = (static_cast<double>(z[i]) - top) * scale - middle;
            p[static_cast<std::size_t>(i)] = less > -1.0 ? std::exp(power * std::log1p(less)) : 0.0;
            sum += p[static_cast<std::size_t>(i)];
        }
        (sum >= 1.0 ? low : high) = middle;
    }
    for (auto& probability : p) probability /= sum;
    if (options.epsilon > 0.0) {
        const double cut = std::min(options.epsilon, *std::max_element(p.begin(), p.end()));
        sum = 0.0;
        for (auto& probability : p) sum += probability = probability < cut ? 0.0 : probability;
        for (auto& probability : p) probability /= sum;
    }
    return p;
}

template <class T>
void matches_the_definition(std::int64_t cols, double alpha, double temperature, double epsilon) {
    std::mt19937 random(5);
    const std::int64_t rows = 6;
    const double tolerance = sizeof(T) == 4 ? 2e-6 : 1e-11;
    const auto z = logits<T>(rows, cols, random);
    const globe::EntmaxOptions options{alpha, temperature, epsilon};
    Numbers<T> p(z.size(), T(-1)), again(z.size(), T(-1));
    globe::entmax(view(z, cols), view(p, cols), options, 1);
    globe::entmax_rows(view(z, cols), view(again, cols), 0, 2, options);
    globe::entmax_rows(view(z, cols), view(again, cols), 2, rows, options);
    const std::string what = std::to_string(cols) + " columns, alpha " + std::to_string(alpha) +
                             ", temperature " + std::to_string(temperature) + ", epsilon " +
                             std::to_string(epsilon) + (sizeof(T) == 4 ? ", float" : ", double");
    check(p == again, "rows on their own, " + what);
    for (std::int64_t row = 0; row < rows; ++row) {
        const auto expected = by_definition(z.data() + row * cols, cols, options);
        double worst = 0.0, sum = 0.0;
        for (std::int64_t i = 0; i < cols; ++i) {
            const double probability = p[static_cast<std::size_t>(row * cols + i)];
            worst = std::max(worst, std::fabs(probability - expected[static_cast<std::size_t>(i)]));
            sum += probability;
        }
        check(worst <= tolerance,
              "row " + std::to_string(row) + " off by " + std::to_string(worst) + ", " + what);
        check(std::fabs(sum - 1.0) <= tolerance, "sum of row " + std::to_string(row) + ", " + what);
    }
}

template <class T>
void derivative_matches_the_definition(std::int64_t cols, double alpha) {
    std::mt19937 random(6);
    const std::int64_t rows = 6;
    const double tolerance = sizeof(T) == 4 ? 5e-6 : 1e-13;
    const globe::EntmaxOptions options{alpha, 0.7, 0.0};
    const auto z = logits<T>(rows, cols, random);
    Numbers<T> y(z.size()), dz(z.size(), T(-1)), again(z.size(), T(-1));
    globe::entmax(view(z, cols), view(y, cols), options, 1);
    y[1 % y.size()] = std::numeric_limits<T>::denorm_min();
    const auto& const_y = y;
    const auto dy = gradient(y, random);
    globe::entmax_backward(view(const_y, cols), view(dy, cols), view(dz, cols), options, 1);
    globe::entmax_backward_rows(view(const_y, cols), view(dy, cols), view(again, cols), 0, 3, options);
    globe::entmax_backward_rows(view(const_y, cols), view(dy, cols), view(again, cols), 3, rows, options);
    const std::string what = std::to_string(cols) + " columns, alpha " + std::to_string(alpha);
    check(dz == again, "derivative of rows on their own, " + what);
    for (std::int64_t row = 0; row < rows; ++row) {
        double total = 0.0, product = 0.0, largest = 1.0;
        const auto weight = [&](std::int64_t i) {
            const double share = y[static_cast<std::size_t>(row * cols + i)];
            return share > 0.0 ? std::pow(share, 2.0 - alpha) : 0.0;
        };
        const auto pull = [&](std::int64_t i) {
            return weight(i) > 0.0 ? double{dy[static_cast<std::size_t>(row * cols + i)]} : 0.0;
        };
        for (std::int64_t i = 0; i < cols; ++i) {
            total += weight(i);
            product += weight(i) * pull(i);
            largest = std::max(largest, std::fabs(pull(i)));
        }
        for (std::int64_t i = 0; i < cols; ++i) {
            const double expected = weight(i) * (pull(i) - product / total) / options.temperature;
            const double error = std::fabs(dz[static_cast<std::size_t>(row * cols + i)] - expected);
            if (!(error <= tolerance * largest)) {
                check(false, "derivative at row " + std::to_string(row) + " column " + std::to_string(i) +
                                 ", " + what);
                break;
            }
        }
    }
}

// Rows of a wider matrix, on any number of threads; what lies between them stays.
void strides_and_threads(double alpha) {
    std::mt19937 random(7);
    const std::int64_t rows = 700, cols = 90, pitch = 101;
    std::normal_distribution<float> normal;
    Numbers<float> z(rows * pitch), p(z.size(), -1.0F), dz(z.size(), -1.0F);
    for (auto& entry : z) entry = normal(random);
    const globe::EntmaxOptions options{alpha, 1.0, 0.0};
    const globe::RowsView<const float> in{z.data(), rows, cols, pitch}, y{p.data(), rows, cols, pitch};
    globe::entmax(in, {p.data(), rows, cols, pitch}, options, 1);
    globe::entmax_backward(y, in, {dz.data(), rows, cols, pitch}, options, 1);
    for (const int threads : {0, 2, 5}) {
        Numbers<float> p2(z.size(), -1.0F), dz2(z.size(), -1.0F);
        globe::entmax(in, {p2.data(), rows, cols, pitch}, options, threads);
        globe::entmax_backward(y, in, {dz2.data(), rows, cols, pitch}, options, threads);
        check(p == p2 && dz == dz2, "threads change nothing");
    }
    bool untouched = true, written = true;
    for (std::size_t i = 0; i < z.size(); ++i) {
        const bool inside = static_cast<std::int64_t>(i) % pitch < cols;
        untouched &= inside || (p[i] == -1.0F && dz[i] == -1.0F);
        written &= !inside || p[i] != -1.0F;
    }
    check(untouched && written, "strides");
}

template <class T>
void extremes() {
    const T most = std::numeric_limits<T>::max(), minus = static_cast<T>(-infinity);
    for (const double alpha : {1.0 + 1e-12, 1.3, 1.5, 2.0}) {
        for (const double temperature : {1e-300, 1e-30, 1.0, 1e30, 1e300}) {
            const Numbers<T> z{most, -most, minus, most, T(0), most};
            Numbers<T> p(z.size());
            globe::entmax(view(z, 6), view(p, 6), {alpha, temperature, 0.0}, 1);
            double sum = 0.0;
            for (const T probability : p) sum += probability;
            check(
                std::fabs(sum - 1.0) < 1e-6 && p[0] == p[3] && p[0] == p[5] && p[2] == T(0) && p[0] > T(0),
                "extremes, alpha " + std::to_string(alpha) + ", temperature " + std::to_string(temperature));
        }
    }
    // epsilon above the largest probability keeps it.
    const Numbers<T> flat(300, T(3));
    Numbers<T> p(flat.size());
    globe::entmax(view(flat, 300), view(p, 300), {1.5, 1.0, 0.5}, 1);
    check(std::fabs(static_cast<double>(p[0]) * 300.0 - 1.0) < 1e-5 && p[0] == p[299],
          "epsilon keeps the largest");
}

template <class T>
void refuses() {
    Numbers<T> z(12, T(1)), p(12), narrow(8);
    const auto in = view(const_cast<const Numbers<T>&>(z), 4);
    check_refused("alpha", [&] { globe::entmax(in, view(p, 4), {1.0, 1.0, 0.0}); });
    check_refused("alpha", [&] { globe::entmax(in, view(p, 4), {std::nan(""), 1.0, 0.0}); });
    check_refused("temperature", [&] { globe::entmax(in, view(p, 4), {1.5, 0.0, 0.0}); });
    check_refused("epsilon", [&] { globe::entmax(in, view(p, 4), {1.5, 1.0, 1.0}); });
    check_refused("probabilities", [&] { globe::entmax(in, view(narrow, 4)); });
    check_refused("begin, end", [&] { globe::entmax_rows(in, view(p, 4), 2, 4); });
    check_refused("logits",
                  [&] { globe::entmax(globe::RowsView<const T>{z.data(), 3, 0}, {p.data(), 3, 0}); });
    check_refused("gradient", [&] {
        const Numbers<T> short_gradient(8);
        globe::entmax_backward(in, view(short_gradient, 4), view(p, 4));
    });
    for (const std::int64_t cols : {1, 5, 70, 300}) {
        for (const double bad : {std::nan(""), infinity, -infinity}) {
            Numbers<T> rows(static_cast<std::size_t>(3 * cols), T(0)), out(rows.size());
            std::fill_n(rows.begin() + cols, bad == -infinity ? cols : 0, static_cast<T>(bad));
            rows[static_cast<std::size_t>(2 * cols - 1)] = static_cast<T>(bad);
            const auto& const_rows = rows;
            for (const double alpha : {1.2, 1.5, 2.0}) {
                check_refused("logits", [&] {
                    globe::entmax(view(const_rows, cols), view(out, cols), {alpha, 1.0, 0.0});
                });
            }
        }
    }
}

}  // namespace

int main() {
    globe::tests::on_every_isa([] {
        for (const std::int64_t cols : {1, 2, 7, 8, 16, 17, 63, 64, 65, 130, 360, 512, 3000}) {
            for (const double alpha : {1.0001, 1.25, 1.5, 1.9, 2.0}) {
                for (const double epsilon : {0.0, 0.013}) {
                    matches_the_definition<float>(cols, alpha, 0.7, epsilon);
                    matches_the_definition<double>(cols, alpha, 0.7, epsilon);
                }
                derivative_matches_the_definition<float>(cols, alpha);
                derivative_matches_the_definition<double>(cols, alpha);
            }
        }
        for (const double alpha : {1.25, 1.5, 2.0}) strides_and_threads(alpha);
        extremes<float>();
        extremes<double>();
        refuses<float>();
        refuses<double>();
    });
    return globe::tests::result();
}
