// The only place where NumPy arrays become views of the core.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "globe/view.hpp"

namespace globe::bindings {

namespace py = pybind11;

inline DType parse_dtype(const std::string& argument, const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "float16") return DType::float16;
    if (name == "bfloat16") return DType::bfloat16;
    throw std::invalid_argument(argument + ": found " + name + "; expected float32, float16 or bfloat16");
}

// 16-bit types arrive as uint16 bits, because NumPy's buffer protocol cannot name bfloat16.
inline void check_storage(const std::string& argument, const py::array& array, DType dtype) {
    const bool fits = dtype == DType::float32 ? py::isinstance<py::array_t<float>>(array)
                                              : py::isinstance<py::array_t<std::uint16_t>>(array);
    if (!fits) throw std::invalid_argument(argument + ": the array's storage does not match its dtype name");
    if (array.ndim() != 2) throw std::invalid_argument(argument + ": expected a matrix");
}

inline void check_matrix(const std::string& argument, const py::array& array, DType dtype) {
    check_storage(argument, array, dtype);
    if ((array.flags() & py::array::c_style) == 0) {
        throw std::invalid_argument(argument + ": expected a C-contiguous array");
    }
}

inline ConstMatrixView const_matrix(const std::string& argument, const py::array& array, DType dtype) {
    check_matrix(argument, array, dtype);
    return {array.data(), array.shape(0), array.shape(1), dtype};
}

// Rows without gaps inside, but any distance apart.
inline ConstMatrixView strided_matrix(const std::string& argument, const py::array& array, DType dtype) {
    check_storage(argument, array, dtype);
    const auto entry = static_cast<std::int64_t>(size_of(dtype));
    const std::int64_t rows = array.shape(0), cols = array.shape(1), step = array.strides(0);
    if (rows <= 1 || cols == 0) return {array.data(), rows, cols, dtype};
    if (array.strides(1) != entry || step % entry != 0 || step < cols * entry) {
        throw std::invalid_argument(argument + ": expected rows without gaps inside");
    }
    return {array.data(), rows, cols, dtype, step / entry};
}

// The entries of a writeable, contiguous n x n array.
inline double* square(const std::string& argument, py::array_t<double>& array, std::int64_t n) {
    if (array.ndim() != 2 || array.shape(0) != n || array.shape(1) != n ||
        (array.flags() & py::array::c_style) == 0) {
        throw std::invalid_argument(argument + ": expected a C-contiguous square matrix");
    }
    return array.mutable_data();
}

inline MatrixView matrix(const std::string& argument, py::array& array, DType dtype) {
    check_matrix(argument, array, dtype);
    return {array.mutable_data(), array.shape(0), array.shape(1), dtype};
}

template <class T>
using Vector = py::array_t<T, py::array::c_style>;

template <class T>
RowsView<const T> const_rows(const std::string& argument, const Vector<T>& array) {
    if (array.ndim() != 2) throw std::invalid_argument(argument + ": expected a matrix");
    return {array.data(), array.shape(0), array.shape(1)};
}

template <class T>
RowsView<T> rows(const std::string& argument, Vector<T>& array) {
    if (array.ndim() != 2) throw std::invalid_argument(argument + ": expected a matrix");
    return {array.mutable_data(), array.shape(0), array.shape(1)};
}

inline CsrView csr(const Vector<std::int64_t>& indptr, const Vector<std::int32_t>& indices,
                   const Vector<float>& values, std::int64_t cols) {
    if (indptr.ndim() != 1 || indptr.size() < 1)
        throw std::invalid_argument("indptr: expected rows + 1 offsets");
    if (indices.ndim() != 1 || values.ndim() != 1 || indices.size() != values.size()) {
        throw std::invalid_argument("values: expected one value per index");
    }
    return {indptr.data(), indices.data(), values.data(), indptr.size() - 1, cols, indices.size()};
}

}  // namespace globe::bindings
