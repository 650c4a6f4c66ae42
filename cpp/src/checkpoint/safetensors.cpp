#include "checkpoint/safetensors.hpp"

#include <algorithm>
#include <string_view>
#include <utility>

#include "checkpoint/json.hpp"
#include "globe/factored.hpp"

namespace globe::detail {
namespace {

constexpr std::uint64_t longest_header = 100'000'000;

// Bits of an entry; 0 for a dtype that is not of the format.
std::uint64_t bits_of(std::string_view dtype) {
    constexpr std::pair<std::string_view, std::uint64_t> known[] = {
        {"BF16", 16},       {"F16", 16},        {"F32", 32},    {"F64", 64},    {"I64", 64},
        {"I32", 32},        {"I16", 16},        {"I8", 8},      {"U64", 64},    {"U32", 32},
        {"U16", 16},        {"U8", 8},          {"BOOL", 8},    {"F8_E4M3", 8}, {"F8_E5M2", 8},
        {"F4", 4},          {"F6_E2M3", 6},     {"F6_E3M2", 6}, {"F8_E8M0", 8}, {"C64", 64},
        {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
    };
    for (const auto& [name, bits] : known) {
        if (name == dtype) return bits;
    }
    return 0;
}

// Whether that many bytes are what entries of these bits and this shape take.
bool takes(const StoredTensor& tensor, std::uint64_t bits) {
    if (std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end())
        return tensor.bytes == 0;
    std::uint64_t total = bits;
    for (const std::int64_t extent : tensor.shape) {
        if (__builtin_mul_overflow(total, static_cast<std::uint64_t>(extent), &total)) return false;
    }
    return total % 8 == 0 && total / 8 == tensor.bytes;
}

std::string list_of(const std::vector<std::int64_t>& shape) {
    std::string told;
    for (const std::int64_t extent : shape) told += (told.empty() ? "" : ", ") + std::to_string(extent);
    return "[" + told + "]";
}

StoredTensor entry_of(const std::string& name, const Json& entry, std::uint64_t origin) {
    const auto offsets = wholes(member(entry, "data_offsets"), "data_offsets");
    require(offsets.size() == 2 && offsets[0] <= offsets[1], "data_offsets");
    const auto first = static_cast<std::uint64_t>(offsets[0]), last = static_cast<std::uint64_t>(offsets[1]);
    return {name, text(member(entry, "dtype"), "dtype"), wholes(member(entry, "shape"), "shape"),
            origin + first, last - first};
}

std::vector<StoredTensor> parse_header(std::string_view header, std::uint64_t origin) {
    std::vector<StoredTensor> found;
    const Json entries = parse_json(header);
    for (const auto& [name, entry] : entries.items()) {
        if (name == "__metadata__") {
            object(entry, "__metadata__");
        } else {
            found.push_back(entry_of(name, entry, origin));
        }
    }
    std::sort(found.begin(), found.end(), [](const StoredTensor& a, const StoredTensor& b) {
        return std::pair(a.first, a.bytes) < std::pair(b.first, b.bytes);
    });
    return found;
}

}  // namespace

std::vector<StoredTensor> read_header(const std::string& path, const Bytes& file) {
    std::uint64_t length = 0;
    for (unsigned i = 0; i < 8 && file.size >= 8; ++i) length |= std::uint64_t{file.data[i]} << (8 * i);
    if (file.size < 8 || length == 0 || length > std::min(longest_header, file.size - 8)) {
        throw CheckpointError(path + ": not a whole safetensors file (header cut off at " +
                              std::to_string(file.size) + " bytes); fetch it again");
    }
    std::vector<StoredTensor> tensors;
    try {
        const auto* start = reinterpret_cast<const char*>(file.data) + 8;
        tensors = parse_header({start, static_cast<std::size_t>(length)}, 8 + length);
    } catch (const Damaged& damaged) {
        throw CheckpointError(path + ": the safetensors header is not valid (" + damaged.what() +
                              "); fetch the file again");
    }
    std::uint64_t end = 8 + length;
    for (const StoredTensor& tensor : tensors) {
        if (tensor.first != end) {
            throw CheckpointError(path + ": tensor " + tensor.name + " starts at byte " +
                                  std::to_string(tensor.first) + ", expected " + std::to_string(end) +
                                  "; fetch the file again");
        }
        end += tensor.bytes;
        const std::uint64_t bits = bits_of(tensor.dtype);
        if (bits == 0) {
            throw CheckpointError(path + ": tensor " + tensor.name + " has dtype " + tensor.dtype +
                                  ", which is not of the format; fetch the file again");
        }
        if (!takes(tensor, bits)) {
            throw CheckpointError(path + ": tensor " + tensor.name + " has " + std::to_string(tensor.bytes) +
                                  " bytes, not what " + tensor.dtype + " " + list_of(tensor.shape) +
                                  " takes");
        }
    }
    if (end != file.size) {
        throw CheckpointError(path + ": " + std::to_string(file.size) + " bytes found, the header promises " +
                              std::to_string(end) + "; it is truncated, fetch it again");
    }
    return tensors;
}

}  // namespace globe::detail
