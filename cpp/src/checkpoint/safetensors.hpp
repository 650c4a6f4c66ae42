// The header of a safetensors file: https://github.com/huggingface/safetensors#format
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/files.hpp"

namespace globe::detail {

struct StoredTensor {
    std::string name, dtype;
    std::vector<std::int64_t> shape;
    std::uint64_t first, bytes;  // where its data lie in the file
};

// The tensors in the order of their bytes, which fill the file from the header's end to its own. Throws
// CheckpointError where they do not, or a tensor's bytes are not what its dtype and shape take.
std::vector<StoredTensor> read_header(const std::string& path, const Bytes& file);

}  // namespace globe::detail
