// Files of a checkpoint as bytes in memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace globe::detail {

struct Bytes {
    std::shared_ptr<const void> owner;
    const unsigned char* data;
    std::uint64_t size;
};

// Gives a file of the directory by its name, or throws CheckpointError.
using ReadFile = std::function<Bytes(const std::string& name)>;

// Maps a file for reading; it must not change while the bytes are in use.
Bytes map_file(const std::string& path);

}  // namespace globe::detail
