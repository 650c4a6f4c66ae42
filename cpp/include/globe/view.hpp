// Non-owning views of row-major data. Nothing here allocates or copies.
#pragma once

#include <cstddef>
#include <cstdint>

namespace globe {

// Storage of matrix entries. float16 and bfloat16 are handled as their bits in a uint16.
enum class DType { float32, float16, bfloat16 };

constexpr std::size_t size_of(DType dtype) {
    return dtype == DType::float32 ? 4 : 2;
}

// rows x cols entries, row after row; stride entries from one row to the next (0: cols, no gaps).
struct ConstMatrixView {
    const void* data;
    std::int64_t rows;
    std::int64_t cols;
    DType dtype;
    std::int64_t stride = 0;
};

struct MatrixView {
    void* data;
    std::int64_t rows;
    std::int64_t cols;
    DType dtype;
    std::int64_t stride = 0;
};

// Bytes from one row to the next.
template <class View>
constexpr std::int64_t row_bytes(const View& view) {
    return (view.stride != 0 ? view.stride : view.cols) * static_cast<std::int64_t>(size_of(view.dtype));
}

// rows x cols numbers of one type, const or not; stride as above.
template <class T>
struct RowsView {
    T* data;
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t stride = 0;

    constexpr std::int64_t pitch() const { return stride != 0 ? stride : cols; }
};

// Compressed sparse rows: row i holds entries indptr[i] .. indptr[i + 1]. Functions that take one check all
// that is said here before they follow an index; that the arrays are as long as said is for the caller to see
// to.
struct CsrView {
    const std::int64_t* indptr;   // rows + 1 offsets that do not fall, from 0 to nnz
    const std::int32_t* indices;  // nnz column numbers in [0, cols)
    const float* values;          // nnz values
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t nnz;
};

}  // namespace globe
