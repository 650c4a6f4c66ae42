// What is compiled once per instruction set: a table of inner loops, filled in by variant.cpp.
//
// Code that is included there must have internal linkage and use no templates of the standard library: the
// linker may keep one copy of a shared inline function, and that copy may hold instructions that another
// machine does not have (numpy/numpy#25274).
#pragma once

#include <cstdint>

#include "globe/view.hpp"

namespace globe::detail {

// One entry of a row of codes: where its atom starts, and its weight.
struct Term {
    const unsigned char* atom;
    float weight;
};

// out[0:width] = sum of weight * atom[begin : begin + width], rounded once.
using ComposeRow = void (*)(const Term* terms, std::int64_t count, std::int64_t begin, std::int64_t width,
                            void* out);

// sum of a[t] * b[t] for t in [0, width).
using Dot = double (*)(const void* a, const void* b, std::int64_t width);

struct Variant {
    const char* name;
    ComposeRow compose[3][3];  // by dtype of the bank, by dtype of the output
    Dot dot[3][3];             // by dtype of a, by dtype of b
};

// The table in use.
const Variant& variant();

constexpr int index_of(DType dtype) {
    return static_cast<int>(dtype);
}

}  // namespace globe::detail
