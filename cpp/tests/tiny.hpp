// A small factored directory made up in memory, as globe compress would write it.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace globe::tests {

constexpr std::int64_t layers = 2, experts = 3, width = 5, hidden = 7, rank = 4, atoms = 3;

// Tensors of a safetensors file, in order.
class TensorFile {
  public:
    void add(const std::string& name, const std::string& dtype, const std::vector<std::int64_t>& shape,
             const void* data, std::size_t bytes) {
        std::string extents;
        for (const auto extent : shape) extents += (extents.empty() ? "" : ",") + std::to_string(extent);
        entries_ += (entries_.empty() ? "{\"" : ",\"") + name + R"(":{"dtype":")" + dtype + R"(","shape":[)" +
                    extents + R"(],"data_offsets":[)" + std::to_string(data_.size()) + "," +
                    std::to_string(data_.size() + bytes) + "]}";
        data_.append(static_cast<const char*>(data), bytes);
    }

    std::string bytes() const {
        const std::string header = entries_ + "}";
        std::string length(8, '\0');
        for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xFFU);
        return length + header + data_;
    }

  private:
    std::string entries_, data_;
};

using Files = std::map<std::string, std::string>;

// Bits of random bfloat16 numbers.
inline std::vector<std::uint16_t> numbers(std::int64_t count, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<std::uint16_t> found;
    for (std::int64_t i = 0; i < count; ++i) {
        const float value = normal(random);
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, 4);
        found.push_back(static_cast<std::uint16_t>(bits >> 16));
    }
    return found;
}

// Gate and up factored in banks of their own, down dense; one tensor for each expert. The atoms are an odd
// number of bfloat16 numbers, so that the codes lie askew.
inline Files tiny_directory() {
    std::mt19937 random(3);
    TensorFile shard, bank;
    const char* families[] = {"gate", "up", "down"};
    std::string source, rows[2], banks[2], index;
    const auto named = [&index](const std::string& name, const char* file) {
        index += (index.empty() ? "\"" : ",\"") + name + "\":\"" + file + '"';
        return name;
    };
    const auto add = [&](TensorFile& file, const std::string& name, const std::vector<std::int64_t>& shape) {
        std::int64_t count = 1;
        for (const auto extent : shape) count *= extent;
        const auto bits = numbers(count, random);
        file.add(name, "BF16", shape, bits.data(), bits.size() * 2);
    };
    for (std::int64_t layer = 0; layer < layers; ++layer) {
        for (std::int64_t expert = 0; expert < experts; ++expert) {
            for (std::size_t f = 0; f < 3; ++f) {
                const std::string name = "model.layers." + std::to_string(layer) + ".mlp.experts." +
                                         std::to_string(expert) + "." + families[f] + "_proj.weight";
                const auto shape = f == 2 ? std::vector{hidden, width} : std::vector{width, hidden};
                source += (source.empty() ? "\"" : ",\"") + name + R"(":{"dtype":"BF16","shape":[)" +
                          std::to_string(shape[0]) + "," + std::to_string(shape[1]) + "]}";
                if (f == 2) {
                    add(shard, named(name, "globe.safetensors"), shape);
                    continue;
                }
                add(shard, named(name + ".globe_" + families[f] + "_left", "globe.safetensors"),
                    {width, rank});
                rows[f] += (rows[f].empty() ? "\"" : ",\"") + name + "\":[" +
                           std::to_string(layer * experts + expert) + "]";
                banks[f] += (banks[f].empty() ? "\"" : ",\"") + name + "\":\"" + families[f] + '"';
            }
        }
    }
    std::string told_families, told_banks;
    for (std::size_t f = 0; f < 2; ++f) {
        const std::string prefix = std::string("globe.") + families[f] + ".";
        const char* file = "globe-bank.safetensors";
        const char odd = 1;
        if (f == 0) bank.add(named("padding", file), "U8", {1}, &odd, 1);
        add(bank, named(prefix + "atoms", file), {atoms, rank, hidden});
        const std::int32_t indptr[] = {0, 2, 3, 5, 5, 8, 9}, indices[] = {0, 2, 1, 0, 1, 0, 1, 2, 2};
        const float values[] = {0.5F, 1.0F, 2.0F, 0.25F, 1.5F, 1.0F, -1.0F, 0.125F, 3.0F};
        bank.add(named(prefix + "codes.indptr", file), "I32", {7}, indptr, sizeof indptr);
        bank.add(named(prefix + "codes.indices", file), "I32", {9}, indices, sizeof indices);
        bank.add(named(prefix + "codes.values", file), "F32", {9}, values, sizeof values);
        const std::string comma = f == 0 ? "" : ",";
        told_families += comma + '"' + families[f] +
                         R"(":{"experts":6,"p":5,"d":7,"rank":4,"bank":3,"tensors":{)" + rows[f] +
                         R"(},"banks":{)" + banks[f] + "}}";
        told_banks += comma + '"' + families[f] + R"(":{"experts":6,"rank":4,"bank":3})";
    }
    Files files;
    files["globe.safetensors"] = shard.bytes();
    files["globe-bank.safetensors"] = bank.bytes();
    files["globe.json"] = R"({"format_version":2,"families":{)" + told_families + R"(},"banks":{)" +
                          told_banks +
                          R"(},"source":{"layout":"olmoe","index_metadata":null,"shards":[{"file":)" +
                          R"("model.safetensors","metadata":{},"tensors":{)" + source + "}}]}}";
    files["globe.safetensors.index.json"] = R"({"weight_map":{)" + index + "}}";
    files["config.json"] =
        R"({"num_hidden_layers":2,"limit":[0.0,Infinity],"quantization_config":{"experts":{)"
        R"("gate":{"0":["gate",0,1],"1":["gate",3,1]},"up":{"0":["up",0,1],"1":["up",3,1]}}}})";
    return files;
}

// The files on disk, until the end.
class Written {
  public:
    explicit Written(const Files& files) {
        std::random_device random;
        path_ = std::filesystem::temp_directory_path() / ("globe-test-" + std::to_string(random()));
        std::filesystem::create_directory(path_);
        for (const auto& [name, bytes] : files) std::ofstream(path_ / name, std::ios::binary) << bytes;
    }
    ~Written() { std::filesystem::remove_all(path_); }
    Written(const Written&) = delete;
    Written& operator=(const Written&) = delete;
    std::string path() const { return path_.string(); }

  private:
    std::filesystem::path path_;
};

}  // namespace globe::tests
