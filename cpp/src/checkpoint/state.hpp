// What an opened checkpoint holds.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "checkpoint/files.hpp"
#include "checkpoint/safetensors.hpp"
#include "globe/factored.hpp"

namespace globe {

struct FactoredCheckpoint::State {
    struct File {
        std::string name;
        detail::Bytes bytes;
        std::vector<detail::StoredTensor> tensors;
    };
    // The matrices of a layer's experts, by family.
    using Layer = std::array<std::vector<ExpertMatrix>, 3>;

    // The columns of gate and up, and of down's transpose.
    std::int64_t width_of(const ExpertMatrix& matrix) const {
        return matrix.factored() ? banks[static_cast<std::size_t>(matrix.bank)].width : matrix.stored.cols;
    }

    std::uint64_t number = 0;  // no two have the same
    std::string directory;
    std::deque<File> files;
    std::vector<Tensor> tensors;
    std::unordered_map<std::string_view, std::size_t> places;  // among the tensors
    std::vector<Bank> banks;
    std::vector<Family> families;
    std::vector<std::int64_t> layers;
    std::map<std::int64_t, Layer> experts;
    std::int64_t p = 0, d = 0, rank = 0, support = 0;  // the largest
    std::deque<std::vector<std::int64_t>> offsets;     // indptr of the banks
    std::deque<std::vector<std::uint64_t>> aligned;    // copies of tensors that lie askew in their file
};

namespace detail {

// Opens a directory whose files `read` gives. Throws CheckpointError.
std::unique_ptr<FactoredCheckpoint::State> open_state(const std::string& directory, const ReadFile& read);

}  // namespace detail
}  // namespace globe
