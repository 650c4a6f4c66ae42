// globe.json, as far as running the experts needs it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace globe::detail {

struct BankRecord {
    std::int64_t experts, rank, size;
};

// Per source tensor, the rows of the codes that its experts have, and the bank of those codes.
struct FamilyRecord {
    std::int64_t experts, p, d, rank, size;
    std::map<std::string, std::vector<std::int64_t>> tensors;
    std::map<std::string, std::string> banks;
};

struct SourceTensor {
    std::string dtype;
    std::vector<std::int64_t> shape;
};

struct Shard {
    std::string file;  // of the source
    std::map<std::string, SourceTensor> tensors;
};

struct Manifest {
    std::string layout;
    std::map<std::string, BankRecord> banks;
    std::array<std::optional<FamilyRecord>, 3> families;  // in the order of Family
    std::vector<Shard> shards;
};

// What a source tensor is stored as.
struct Promise {
    std::string name, dtype;
    std::vector<std::int64_t> shape;
};

// Reads it and checks that it agrees with itself. Throws Damaged, or CheckpointError for a version not read.
Manifest read_manifest(const std::string& path, std::string_view text);

// The tensor itself, or left factors and halves left as they were. Throws Damaged where shapes do not fit.
std::vector<Promise> promised(const Manifest& manifest, const std::string& tensor,
                              const SourceTensor& source);

}  // namespace globe::detail
