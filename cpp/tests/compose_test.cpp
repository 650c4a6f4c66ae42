// Compares compose with the definition, entry by entry.
#include "globe/compose.hpp"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

using globe::tests::check;

struct Codes {
    std::vector<std::int64_t> indptr{0};
    std::vector<std::int32_t> indices;
    std::vector<float> values;
    std::int64_t cols;

    globe::CsrView view() const {
        return {indptr.data(), indices.data(),
                values.data(), static_cast<std::int64_t>(indptr.size()) - 1,
                cols,          static_cast<std::int64_t>(indices.size())};
    }
};

Codes random_codes(std::int64_t rows, std::int32_t cols, std::mt19937& random) {
    Codes codes;
    codes.cols = cols;
    std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int32_t j = 0; j < cols; ++j) {
            if (i % 4 != 3 && uniform(random) > 0.0F) {
                codes.indices.push_back(j);
                codes.values.push_back(uniform(random));
            }
        }
        codes.indptr.push_back(static_cast<std::int64_t>(codes.indices.size()));
    }
    return codes;
}

void matches_the_definition(std::int64_t width) {
    std::mt19937 random(7);
    const std::int64_t n = 9;
    const std::int32_t m = 5;
    const Codes codes = random_codes(n, m, random);
    std::normal_distribution<float> normal;
    std::vector<float> bank(static_cast<std::size_t>(m * width));
    for (auto& entry : bank) entry = normal(random);
    std::vector<float> out(static_cast<std::size_t>(n * width), -1.0F);
    std::vector<float> again(out);
    const globe::ConstMatrixView bank_view{bank.data(), m, width, globe::DType::float32};
    const float epsilon = 0.25F;
    globe::compose(codes.view(), bank_view, {out.data(), n, width, globe::DType::float32}, epsilon, 1);
    globe::compose(codes.view(), bank_view, {again.data(), n, width, globe::DType::float32}, epsilon, 3);
    check(out == again, "threads change nothing, width " + std::to_string(width));
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t t = 0; t < width; ++t) {
            double expected = 0.0;
            for (auto k = codes.indptr[i]; k < codes.indptr[i + 1]; ++k) {
                if (std::fabs(codes.values[k]) < epsilon) continue;
                expected += static_cast<double>(codes.values[k]) * bank[codes.indices[k] * width + t];
            }
            if (std::fabs(out[i * width + t] - expected) > 1e-5) {
                check(false, "row " + std::to_string(i) + " column " + std::to_string(t));
                return;
            }
        }
    }
}

// Every 16-bit pattern, multiplied by one, must come back (NaNs stay NaNs).
void round_trips(globe::DType dtype, std::uint32_t exponent_mask) {
    const std::int64_t width = 65536;
    std::vector<std::uint16_t> bank(width), out(width);
    for (std::uint32_t t = 0; t < width; ++t) bank[t] = static_cast<std::uint16_t>(t);
    Codes one;
    one.cols = 1;
    one.indptr = {0, 1};
    one.indices = {0};
    one.values = {1.0F};
    globe::compose(one.view(), {bank.data(), 1, width, dtype}, {out.data(), 1, width, dtype});
    for (std::uint32_t t = 0; t < width; ++t) {
        const bool nan = (t & 0x7FFFU) > exponent_mask;
        const bool same = nan ? (out[t] & 0x7FFFU) > exponent_mask
                              : out[t] == t || (t == 0x8000U && out[t] == 0U);  // 0 + (-0) = 0
        if (!same) {
            check(false, "16-bit pattern " + std::to_string(t));
            return;
        }
    }
}

void rejects(const std::string& argument, const Codes& codes, std::int64_t bank_rows, float epsilon) {
    std::vector<float> bank(static_cast<std::size_t>(bank_rows) * 3), out(64 * 3);
    globe::tests::check_refused(argument, [&] {
        globe::compose(
            codes.view(), {bank.data(), bank_rows, 3, globe::DType::float32},
            {out.data(), static_cast<std::int64_t>(codes.indptr.size()) - 1, 3, globe::DType::float32},
            epsilon, 1);
    });
}

// Rows on their own are no less careful.
void rejects_rows(const Codes& codes) {
    std::vector<float> bank(6), out(6);
    globe::tests::check_refused("codes", [&] {
        for (const std::int64_t row : {0, 1}) {
            globe::compose_rows(codes.view(), {bank.data(), 2, 3, globe::DType::float32},
                                {out.data(), 2, 3, globe::DType::float32}, row, row + 1);
        }
    });
}

}  // namespace

int main() {
    globe::tests::on_every_isa([] {
        for (const std::int64_t width : {0, 1, 17, 1023, 1024, 1025, 5000}) matches_the_definition(width);
        round_trips(globe::DType::bfloat16, 0x7F80U);
        round_trips(globe::DType::float16, 0x7C00U);
    });
    Codes codes;
    codes.cols = 2;
    codes.indptr = {0, 1};
    codes.indices = {1};
    codes.values = {1.0F};
    rejects("bank", codes, 3, 0.0F);
    rejects("epsilon", codes, 2, -1.0F);
    rejects("epsilon", codes, 2, std::numeric_limits<float>::quiet_NaN());
    codes.indices = {2};
    rejects("codes", codes, 2, 0.0F);
    codes.indices = {0};
    codes.indptr = {0, 2, 1};
    rejects("codes", codes, 2, 0.0F);
    for (const std::vector<std::int64_t>& indptr : {std::vector<std::int64_t>{0, 0, 0},
                                                    {0, 1, 1 << 30},
                                                    {1, 1, 1},
                                                    {0, -(1 << 30), 1},
                                                    {0, 1 << 30, 1}}) {
        codes.indptr = indptr;
        rejects("codes", codes, 2, 0.0F);
        rejects_rows(codes);
    }
    codes.indptr = {0, 1, 1};
    codes.indices = {-1};
    rejects("codes", codes, 2, 0.0F);
    rejects_rows(codes);
    return globe::tests::result();
}
