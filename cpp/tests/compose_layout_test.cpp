// compose and its derivative for every dtype, row distance, range of rows and size, on numbers so small that
// all of them are exact in every dtype.
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "check.hpp"
#include "globe/compose.hpp"

namespace {

using globe::DType;
using globe::tests::check;

constexpr DType dtypes[] = {DType::float32, DType::float16, DType::bfloat16};

std::uint16_t to_half(float value) {
    if (value == 0.0F) return 0;
    int exponent = 0;
    const auto mantissa =
        static_cast<int>(std::frexp(std::fabs(value), &exponent) * 2048.0F);  // 1024 to 2047
    return static_cast<std::uint16_t>((value < 0.0F ? 0x8000 : 0) + ((exponent + 14) << 10) +
                                      (mantissa - 1024));
}

// Rows with a gap between them that must stay as it is, aligned to a cache line, with nothing behind.
class Matrix {
  public:
    Matrix(std::int64_t rows, std::int64_t cols, DType dtype, std::int64_t gap)
        : rows_(rows), cols_(cols), stride_(cols + gap), dtype_(dtype), bytes_(allocate(size())) {
        std::memset(bytes_.get(), 0xAB, size());
    }

    void set(std::int64_t i, std::int64_t t, float value) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, 4);
        if (dtype_ == DType::bfloat16) bits >>= 16;
        if (dtype_ == DType::float16) bits = to_half(value);
        const auto entry = static_cast<std::size_t>(i * stride_ + t) * size_of(dtype_);
        std::memcpy(bytes_.get() + entry, &bits, size_of(dtype_));  // little-endian
    }

    globe::ConstMatrixView read() const { return {bytes_.get(), rows_, cols_, dtype_, stride_}; }
    globe::MatrixView write() { return {bytes_.get(), rows_, cols_, dtype_, stride_}; }
    bool operator==(const Matrix& other) const {
        return std::memcmp(bytes_.get(), other.bytes_.get(), size()) == 0;
    }

  private:
    static constexpr std::align_val_t line{64};
    struct Free {
        void operator()(unsigned char* bytes) const { ::operator delete(bytes, line); }
    };
    static unsigned char* allocate(std::size_t size) {
        return static_cast<unsigned char*>(::operator new(size, line));
    }
    std::size_t size() const { return static_cast<std::size_t>(rows_ * stride_) * size_of(dtype_); }

    std::int64_t rows_, cols_, stride_;
    DType dtype_;
    std::unique_ptr<unsigned char, Free> bytes_;
};

float atom(std::int64_t j, std::int64_t t) {
    return static_cast<float>((7 * j + 3 * t + t / 5) % 7 - 3);
}

// 4 x 3; the last row is empty, and 0.125 falls to epsilon.
const std::int64_t indptr[] = {0, 2, 5, 6, 6};
const std::int32_t indices[] = {0, 2, 2, 1, 0, 1};
const float values[] = {0.5F, -1.0F, 2.0F, 0.125F, 1.0F, -0.5F};
const globe::CsrView codes{indptr, indices, values, 4, 3, 6};
constexpr float epsilon = 0.25F;

float mixture(std::int64_t i, std::int64_t t) {
    float sum = 0.0F;
    for (auto k = indptr[i]; k < indptr[i + 1]; ++k) {
        if (std::fabs(values[k]) >= epsilon) sum += values[k] * atom(indices[k], t);
    }
    return sum;
}

void composes(std::int64_t width, DType from, DType to, std::int64_t gap) {
    const std::string label = "width " + std::to_string(width) + ", dtypes " +
                              std::to_string(static_cast<int>(from)) + " and " +
                              std::to_string(static_cast<int>(to)) + ", gap " + std::to_string(gap);
    Matrix bank(3, width, from, gap), expected(4, width, to, gap), mixtures(4, width, to, gap),
        ranges(4, width, to, gap);
    for (std::int64_t t = 0; t < width; ++t) {
        for (std::int64_t j = 0; j < 3; ++j) bank.set(j, t, atom(j, t));
        for (std::int64_t i = 0; i < 4; ++i) expected.set(i, t, mixture(i, t));
    }
    globe::compose(codes, bank.read(), mixtures.write(), epsilon, 3);
    check(mixtures == expected, "compose, " + label);
    globe::compose_rows(codes, bank.read(), ranges.write(), 0, 1, epsilon);
    globe::compose_rows(codes, bank.read(), ranges.write(), 1, 1, epsilon);
    globe::compose_rows(codes, bank.read(), ranges.write(), 1, 4, epsilon);
    check(ranges == expected, "compose_rows, " + label);

    // The mixtures in the place of their gradient.
    double products[6];
    globe::compose_code_gradient(codes, expected.read(), bank.read(), products, 3);
    for (std::int64_t i = 0; i < 4; ++i) {
        for (auto k = indptr[i]; k < indptr[i + 1]; ++k) {
            double product = 0.0;
            for (std::int64_t t = 0; t < width; ++t) {
                product += static_cast<double>(mixture(i, t)) * atom(indices[k], t);
            }
            check(products[k] == product, "compose_code_gradient, " + label);
        }
    }
}

}  // namespace

int main() {
    globe::tests::on_every_isa([] {
        for (const DType from : dtypes) {
            for (const DType to : dtypes) {
                for (const std::int64_t width : {0, 1, 31, 33, 257, 9001}) {
                    composes(width, from, to, 0);
                    composes(width, from, to, 5);
                }
            }
        }
        // Rows so far apart that the output counts as large and is written past the caches.
        composes(9001, DType::float32, DType::bfloat16, (1 << 20) - 9001);
        composes(9001, DType::bfloat16, DType::float32, (1 << 19) - 9001);
    });
    return globe::tests::result();
}
