// Codes and views made of the input: kernels refuse them or stay inside their arrays, which are exactly as
// long as told.
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "globe/compose.hpp"
#include "globe/entmax.hpp"
#include "globe/gram.hpp"
#include "globe/nnls.hpp"

namespace {

// Takes numbers off the front of the input; zeros once it is used up.
class Input {
  public:
    Input(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}

    template <class T>
    T take() {
        T value{};
        const std::size_t bytes = left_ < sizeof value ? left_ : sizeof value;
        std::memcpy(&value, data_, bytes);
        data_ += bytes;
        left_ -= bytes;
        return value;
    }

    template <class T>
    std::vector<T> take(std::int64_t count) {
        std::vector<T> values;
        for (std::int64_t i = 0; i < count; ++i) values.push_back(take<T>());
        return values;
    }

    std::int64_t small(std::int64_t most) { return take<std::uint8_t>() % (most + 1); }

  private:
    const std::uint8_t* data_;
    std::size_t left_;
};

void compose(Input& input) {
    const std::int64_t rows = input.small(4), cols = input.small(4), nnz = input.small(8),
                       width = input.small(40);
    std::vector<std::int64_t> indptr;
    for (const std::int8_t offset : input.take<std::int8_t>(rows + 1)) indptr.push_back(offset);
    std::vector<std::int32_t> indices;
    for (const std::int8_t column : input.take<std::int8_t>(nnz)) indices.push_back(column);
    const auto values = input.take<float>(nnz);
    const auto dtype = static_cast<globe::DType>(input.small(2)),
               to = static_cast<globe::DType>(input.small(2));
    const auto bank =
        input.take<std::uint8_t>(cols * width * static_cast<std::int64_t>(globe::size_of(dtype)));
    std::vector<std::uint8_t> out(static_cast<std::size_t>(rows * width) * globe::size_of(to));
    std::vector<double> products(static_cast<std::size_t>(nnz));
    const globe::CsrView codes{indptr.data(), indices.data(), values.data(), rows, cols, nnz};
    const globe::ConstMatrixView atoms{bank.data(), cols, width, dtype};
    globe::compose(codes, atoms, {out.data(), rows, width, to}, input.take<float>(), 1);
    globe::compose_code_gradient(codes, {out.data(), rows, width, to}, atoms, products.data(), 1);
}

void entmax(Input& input) {
    const std::int64_t rows = input.small(4), cols = input.small(40), stride = cols + input.small(2);
    const auto logits = input.take<float>(rows * stride);
    std::vector<float> out(logits.size());
    const globe::EntmaxOptions options{input.take<double>(), input.take<double>(), input.take<double>()};
    globe::entmax<float>({logits.data(), rows, cols, stride}, {out.data(), rows, cols, stride}, options, 1);
    std::vector<float> derivative(out.size());
    globe::entmax_backward<float>({out.data(), rows, cols, stride}, {logits.data(), rows, cols, stride},
                                  {derivative.data(), rows, cols, stride}, options, 1);
}

void gram(Input& input) {
    const std::int64_t n = input.small(6), k = input.small(40);
    const auto dtype = static_cast<globe::DType>(input.small(2));
    const auto vectors = input.take<std::uint8_t>(n * k * static_cast<std::int64_t>(globe::size_of(dtype)));
    const auto weights = input.take<float>(k);
    std::vector<double> sums(static_cast<std::size_t>(n * n));
    globe::gram_add({vectors.data(), n, k, dtype}, sums.data(), weights.data(), 1);
    globe::gram_mirror(sums.data(), n);
}

void nnls(Input& input) {
    const std::int64_t m = input.small(5), n = input.small(3);
    const auto gram = input.take<double>(m * m), correlations = input.take<double>(m * n);
    std::vector<double> codes(static_cast<std::size_t>(m * n));
    globe::NnlsOptions options;
    options.max_support = input.small(3);
    const globe::NnlsProblem problem{gram.data(), correlations.data(), m, n, 0.0, input.small(1) == 1};
    globe::nnls(problem, options, {codes.data(), nullptr, nullptr, nullptr}, 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    constexpr void (*kernels[])(Input&) = {compose, entmax, gram, nnls};
    try {
        kernels[input.small(3)](input);
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
