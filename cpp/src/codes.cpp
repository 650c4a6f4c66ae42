#include "codes.hpp"

namespace globe::detail {

void check_codes(const CsrView& codes, const ConstMatrixView& bank, std::int64_t begin, std::int64_t end) {
    require(codes.rows >= 0 && codes.cols >= 0 && codes.nnz >= 0,
            "codes: found a negative number of rows, columns or stored entries");
    require(
        codes.indptr != nullptr && (codes.nnz == 0 || (codes.indices != nullptr && codes.values != nullptr)),
        "codes: found a null pointer; expected rows + 1 offsets, and as many indices as values");
    require(bank.rows == codes.cols, "bank: found " + std::to_string(bank.rows) + " atoms; expected " +
                                         std::to_string(codes.cols) + ", one per column of codes");
    require(0 <= begin && begin <= end && end <= codes.rows,
            "begin, end: found " + shape_of(begin, end) + "; expected a range of the " +
                std::to_string(codes.rows) + " rows of codes");
    require(codes.indptr[0] == 0 && codes.indptr[codes.rows] == codes.nnz,
            "codes: indptr must start at 0 and end at the number of stored entries");
    require(codes.indptr[begin] >= 0, "codes: indptr is negative at row " + std::to_string(begin));
    for (std::int64_t i = begin; i < end; ++i) {
        if (codes.indptr[i] > codes.indptr[i + 1]) {
            throw std::invalid_argument("codes: indptr falls at row " + std::to_string(i));
        }
    }
    require(codes.indptr[end] <= codes.nnz, "codes: indptr falls after row " + std::to_string(end));
    for (std::int64_t k = codes.indptr[begin]; k < codes.indptr[end]; ++k) {
        if (codes.indices[k] < 0 || codes.indices[k] >= codes.cols) {
            throw std::invalid_argument("codes: found column " + std::to_string(codes.indices[k]) +
                                        "; expected 0 to " + std::to_string(codes.cols - 1));
        }
    }
}

}  // namespace globe::detail
