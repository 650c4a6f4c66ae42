// A safetensors file: whatever it holds, it is read or refused, and what is read lies in the file.
#include <cstdint>
#include <cstdlib>

#include "checkpoint/safetensors.hpp"
#include "globe/factored.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        std::uint64_t end = 0;
        for (const auto& tensor : globe::detail::read_header("input", {nullptr, data, size})) {
            if (tensor.first < end || tensor.first + tensor.bytes > size) std::abort();
            end = tensor.first + tensor.bytes;
        }
        if (end > size) std::abort();
    } catch (const globe::CheckpointError&) {
    }
    return 0;
}
