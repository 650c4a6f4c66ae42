// A factored checkpoint, the directory that `globe compress` writes: opened, listed, and seen in place.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "globe/export.h"
#include "globe/view.hpp"

namespace globe {

// A file that is missing, damaged, or of a format that this version does not read; the message is one line
// and says which file and tensor, what was found and what to do.
class GLOBE_API CheckpointError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
    ~CheckpointError() override;
};

// An expert of width p of a model of width d computes down(act(gate x) * (up x)): gate and up are p x d, down
// is d x p.
enum class Family { gate = 0, up = 1, down = 2 };

// Atoms that experts of all layers share, and the codes of those experts, a row each.
struct Bank {
    std::string name;
    std::int64_t rank, width;  // an atom is r x width
    ConstMatrixView atoms;     // m x (r * width), bfloat16
    CsrView codes;             // N x m
};

// One expert's matrix. A dense one is `stored` as the model has it. A factored one is
// stored * sum_j codes[row, j] * atoms[j], with stored p x r in bfloat16; of down that is the transpose.
struct ExpertMatrix {
    ConstMatrixView stored;
    std::int64_t bank = -1;  // its place among the banks; -1: dense
    std::int64_t row = 0;    // of the bank's codes

    bool factored() const { return bank >= 0; }
};

// A tensor of any of the files, as it is stored there. Names, shapes and data live as long as the checkpoint.
struct Tensor {
    std::string_view name, dtype, file;
    std::vector<std::int64_t> shape;
    const void* data;
    std::size_t bytes;
};

// An opened directory of format version 1 or 2. Files are mapped into memory, read when first touched and
// never copied; they must not change while one lives. All headers, the index, globe.json, all codes and the
// atoms are checked when it is opened; left factors and dense matrices only for shape and dtype. Any number
// of threads may use one at the same time.
class GLOBE_API FactoredCheckpoint {
  public:
    // Throws CheckpointError.
    explicit FactoredCheckpoint(const std::string& directory);
    ~FactoredCheckpoint();
    FactoredCheckpoint(FactoredCheckpoint&&) noexcept;
    FactoredCheckpoint& operator=(FactoredCheckpoint&&) noexcept;

    const std::vector<Bank>& banks() const;
    const std::vector<Tensor>& tensors() const;
    const Tensor* find(std::string_view name) const;  // null where there is none

    // The layers that have routed experts, ascending, and how many a layer has: 0 for other layers.
    const std::vector<std::int64_t>& layers() const;
    std::int64_t experts(std::int64_t layer) const;
    std::int64_t hidden_size() const;  // d, the width of the model
    // The families of which at least one expert is factored.
    const std::vector<Family>& families() const;

    // Throws std::invalid_argument where the layer has no such expert.
    const ExpertMatrix& matrix(Family family, std::int64_t layer, std::int64_t expert) const;

    // out = the mixture sum_j codes[row, j] * atoms[j] of a factored matrix, r x width, summed in float32 and
    // rounded once. Throws std::invalid_argument where the matrix is dense or out has another shape.
    void compose(const ExpertMatrix& matrix, const MatrixView& out, int threads = 0) const;

    struct State;  // of the library's own parts
    explicit FactoredCheckpoint(std::unique_ptr<State> state);
    const State& state() const { return *state_; }

  private:
    std::unique_ptr<State> state_;
};

}  // namespace globe
