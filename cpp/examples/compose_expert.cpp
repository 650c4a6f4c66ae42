// compose_expert OUT/globe-bank.safetensors FAMILY EXPERT RESULT
//
// Writes the mixture of one expert, sum_j codes[EXPERT, j] * atoms[j], as raw float32, row after row, and
// prints its shape. Of the bank it reads only the atoms that this expert uses. The tensors are described in
// docs/format.md, their container at https://github.com/huggingface/safetensors; both are little-endian.
#include <globe/globe.hpp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string& message) {
    throw std::runtime_error(message);
}

// What stands between `open` and `close` after "key": in the text of a header. No JSON parser is needed:
// quotes inside JSON strings are escaped, and neither tensors nor the metadata hold objects or lists of their
// own kind.
std::string field(const std::string& json, const std::string& key, char open, char close) {
    const std::string quoted = '"' + key + '"';
    for (std::size_t at = 0; (at = json.find(quoted, at)) != std::string::npos;) {
        at = json.find_first_not_of(" \t\r\n", at + quoted.size());
        if (at == std::string::npos || json[at] != ':') continue;
        at = json.find_first_not_of(" \t\r\n", at + 1);
        if (at == std::string::npos || json[at] != open) continue;
        const std::size_t end = json.find(close, at + 1);
        if (end != std::string::npos) return json.substr(at + 1, end - at - 1);
    }
    fail("the header has no " + key);
}

std::vector<std::int64_t> numbers(const std::string& list) {
    std::vector<std::int64_t> found;
    const char* at = list.c_str();
    for (char* end = nullptr;; at = end + 1) {
        const long long value = std::strtoll(at, &end, 10);
        if (end == at) fail("the header has a list that is not of numbers: " + list);
        found.push_back(value);
        while (*end == ' ') ++end;
        if (*end != ',') return found;
    }
}

struct Tensor {
    std::vector<std::int64_t> shape;
    std::int64_t position;  // of its first byte in the file
};

class SafetensorsFile {
  public:
    explicit SafetensorsFile(const std::string& path) : path_(path), file_(path, std::ios::binary) {
        file_.seekg(0, std::ios::end);
        size_ = file_.tellg();
        std::uint64_t length = 0;
        if (size_ < 8) fail(path + ": cannot be read, or is not a safetensors file");
        read_bytes(0, &length, 8);
        if (length > static_cast<std::uint64_t>(size_ - 8)) fail(path + ": the header is cut off");
        header_.resize(length);
        data_ = 8 + static_cast<std::int64_t>(length);
        read_bytes(8, header_.data(), static_cast<std::int64_t>(length));
    }

    // Throws where the tensor is missing, has another dtype or rank, or does not lie in the file.
    Tensor tensor(const std::string& name, const std::string& dtype, std::int64_t entry_bytes,
                  std::size_t rank) const {
        const std::string entry = field(header_, name, '{', '}');
        const std::string found = field(entry, "dtype", '"', '"');
        const auto shape = numbers(field(entry, "shape", '[', ']'));
        const auto offsets = numbers(field(entry, "data_offsets", '[', ']'));
        if (found != dtype || shape.size() != rank || offsets.size() != 2) {
            fail(name + ": found " + found + " of rank " + std::to_string(shape.size()) + "; expected " +
                 dtype + " of rank " + std::to_string(rank));
        }
        std::int64_t bytes = entry_bytes;
        for (const auto extent : shape) {
            if (extent < 0 || (extent > 0 && bytes > size_ / extent)) fail(name + ": larger than the file");
            bytes *= extent;
        }
        if (offsets[0] < 0 || offsets[0] > size_ || offsets[1] != offsets[0] + bytes ||
            data_ + offsets[1] > size_) {
            fail(name + ": its bytes do not lie in the file");
        }
        return {shape, data_ + offsets[0]};
    }

    // Entries [first, first + count) of a tensor whose dtype is stored as T.
    template <class T>
    void read(const Tensor& tensor, std::int64_t first, std::int64_t count, T* to) {
        constexpr std::int64_t entry = sizeof(T);
        read_bytes(tensor.position + first * entry, to, count * entry);
    }

  private:
    void read_bytes(std::int64_t position, void* to, std::int64_t bytes) {
        file_.seekg(position);
        file_.read(static_cast<char*>(to), bytes);
        if (!file_) fail(path_ + ": cannot be read");
    }

    std::string path_, header_;
    std::ifstream file_;
    std::int64_t size_ = 0, data_ = 0;
};

void compose_expert(const std::string& bank, const std::string& family, std::int64_t expert,
                    const std::string& result) {
    SafetensorsFile file(bank);
    const std::string prefix = "globe." + family + '.';
    const Tensor atoms = file.tensor(prefix + "atoms", "BF16", 2, 3);
    const Tensor indptr = file.tensor(prefix + "codes.indptr", "I32", 4, 1);
    const Tensor indices = file.tensor(prefix + "codes.indices", "I32", 4, 1);
    const Tensor values = file.tensor(prefix + "codes.values", "F32", 4, 1);
    const std::int64_t experts = indptr.shape[0] - 1, r = atoms.shape[1], d = atoms.shape[2], width = r * d;
    if (expert < 0 || expert >= experts) {
        fail("EXPERT: found " + std::to_string(expert) + "; expected 0 to " + std::to_string(experts - 1));
    }

    // The expert's row of the codes.
    std::int32_t range[2];
    file.read(indptr, expert, 2, range);
    const std::int64_t begin = range[0], support = range[1] - begin;
    if (begin < 0 || support < 0 || begin + support > indices.shape[0] ||
        indices.shape[0] != values.shape[0]) {
        fail(prefix + "codes: not a matrix in compressed rows");
    }
    const auto count = static_cast<std::size_t>(support);
    std::vector<std::int32_t> atom_numbers(count);
    std::vector<float> weights(count);
    file.read(indices, begin, support, atom_numbers.data());
    file.read(values, begin, support, weights.data());

    // A bank of its atoms alone, in the order of the row.
    std::vector<std::uint16_t> used(count * static_cast<std::size_t>(width));
    std::vector<std::int32_t> order(count);
    for (std::size_t k = 0; k < count; ++k) {
        if (atom_numbers[k] < 0 || atom_numbers[k] >= atoms.shape[0]) {
            fail(prefix + "codes: found atom " + std::to_string(atom_numbers[k]));
        }
        file.read(atoms, atom_numbers[k] * width, width, used.data() + k * static_cast<std::size_t>(width));
        order[k] = static_cast<std::int32_t>(k);
    }

    std::vector<float> mixture(static_cast<std::size_t>(width));
    const std::int64_t row[] = {0, support};
    globe::compose({row, order.data(), weights.data(), 1, support, support},
                   {used.data(), support, width, globe::DType::bfloat16},
                   {mixture.data(), 1, width, globe::DType::float32});

    std::ofstream out(result, std::ios::binary);
    out.write(reinterpret_cast<const char*>(mixture.data()),
              static_cast<std::streamsize>(mixture.size() * sizeof(float)));
    if (!out.flush()) fail(result + ": cannot be written");
    std::printf("%s: %lld x %lld float32, %lld atoms, %s\n", result.c_str(), static_cast<long long>(r),
                static_cast<long long>(d), static_cast<long long>(support), globe::active_isa().c_str());
}

}  // namespace

int main(int argc, char** argv) {
    char* end = nullptr;
    const long long expert = argc == 5 ? std::strtoll(argv[3], &end, 10) : 0;
    if (argc != 5 || end == argv[3] || *end != '\0') {
        std::fprintf(stderr, "usage: compose_expert OUT/globe-bank.safetensors FAMILY EXPERT RESULT\n");
        return 2;
    }
    try {
        compose_expert(argv[1], argv[2], expert, argv[4]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "compose_expert: error: %s\n", error.what());
        return 1;
    }
    return 0;
}
