// A composed mixture and the memory that it lies in.
#pragma once

#include <cstddef>
#include <memory>

#include "globe/expert.hpp"

namespace globe {

class Mixture {
  public:
    Mixture(std::int64_t rank, std::int64_t width, DType dtype)
        : numbers_(new std::uint32_t[(static_cast<std::size_t>(rank * width) * size_of(dtype) + 3) / 4]),
          view{numbers_.get(), rank, width, dtype} {}

    void* data() { return numbers_.get(); }
    std::size_t bytes() const { return static_cast<std::size_t>(view.rows * row_bytes(view)); }

  private:
    std::unique_ptr<std::uint32_t[]> numbers_;

  public:
    const ConstMatrixView view;
};

inline std::shared_ptr<const Mixture> composed(const FactoredCheckpoint& checkpoint,
                                               const ExpertMatrix& matrix, DType dtype, int threads) {
    if (!matrix.factored()) throw std::invalid_argument("matrix: found a dense one; expected a factored one");
    const Bank& bank = checkpoint.banks().at(static_cast<std::size_t>(matrix.bank));
    auto mixture = std::make_shared<Mixture>(bank.rank, bank.width, dtype);
    checkpoint.compose(matrix, {mixture->data(), bank.rank, bank.width, dtype}, threads);
    return mixture;
}

}  // namespace globe
