// How the files and tensors of a factored directory are called.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace globe::detail {

constexpr const char* family_names[] = {"gate", "up", "down"};  // in the order of Family
constexpr const char* manifest_file = "globe.json";
constexpr const char* bank_file = "globe-bank.safetensors";
constexpr const char* index_file = "globe.safetensors.index.json";

// The factored shard that holds a source shard's tensors.
inline std::string shard_name(const std::string& source) {
    constexpr std::string_view model = "model";
    const bool usual = source.compare(0, model.size(), model) == 0;
    return usual ? "globe" + source.substr(model.size()) : "globe-" + source;
}

inline std::string left_name(const std::string& tensor, std::size_t family) {
    return tensor + ".globe_" + family_names[family] + "_left";
}

// The half of a fused source tensor that is not compressed.
inline std::string rest_name(const std::string& tensor, std::size_t family) {
    return tensor + ".globe_" + family_names[family] + "_dense";
}

inline std::string bank_tensor(const std::string& bank, const char* part) {
    return "globe." + bank + "." + part;
}

}  // namespace globe::detail
