#include "checkpoint/manifest.hpp"

#include <algorithm>
#include <iterator>
#include <set>

#include "checkpoint/json.hpp"
#include "checkpoint/names.hpp"
#include "globe/factored.hpp"

namespace globe::detail {
namespace {

constexpr std::int64_t newest_version = 2;
constexpr std::int64_t last_known_version = 4;  // 3 has packed factors and codes, 4 stacks that lie otherwise

// The value of a key, or null where there is no object with it: of a manifest that is not checked yet.
const Json& at(const Json& value, const char* key) {
    static const Json nothing;
    const auto found = value.find(key);
    return found == value.end() ? nothing : *found;
}

// The first entry of an object that has the key, by name, or the end.
auto first_with(const Json& entries, const char* key) {
    return std::find_if(entries.begin(), entries.end(),
                        [key](const Json& entry) { return !at(entry, key).is_null(); });
}

std::string packed_in(const Json& entry) {
    const Json& bits = at(at(entry, "packed"), "bits");
    return " are packed in integers" + (bits.is_number_unsigned() ? " of " + bits.dump() + " bits" : "");
}

// What a manifest of a later version has that this library does not run; empty where that is not to be found.
std::string beyond(const Json& manifest) {
    const Json &families = at(manifest, "families"), &banks = at(manifest, "banks");
    if (families.is_object()) {
        const auto found = first_with(families, "packed");
        if (found != families.end()) return "left factors of family " + found.key() + packed_in(*found);
    }
    if (banks.is_object()) {
        const auto found = first_with(banks, "packed");
        if (found != banks.end()) return "atoms of bank " + found.key() + packed_in(*found);
    }
    for (const Json& shard : at(at(manifest, "source"), "shards")) {
        const Json& tensors = at(shard, "tensors");
        if (!tensors.is_object()) continue;
        const auto told = [&tensors](const char* key, const char* what) {
            const auto found = first_with(tensors, key);
            return found == tensors.end() ? std::string() : "tensor " + found.key() + what;
        };
        for (const std::string& line : {told("encoded", " stays stored as codes"),
                                        told("transposed", " is a stack of [experts, inputs, outputs]"),
                                        told("interleaved", " has rows of gate and up in turns")}) {
            if (!line.empty()) return line;
        }
    }
    return "";
}

void check_version(const std::string& path, const Json& manifest) {
    const auto found = manifest.find("format_version");
    const bool whole_number = found != manifest.end() && found->is_number_unsigned();
    if (whole_number && *found >= 1 && *found <= newest_version) return;
    const bool known = whole_number && *found > newest_version && *found <= last_known_version;
    const std::string why = known ? beyond(manifest) : "";
    throw CheckpointError(path + ": format version " + (found == manifest.end() ? "none" : found->dump()) +
                          (why.empty() ? "" : ", in which " + why) + "; this library reads 1 to " +
                          std::to_string(newest_version) +
                          ": run it with the Python package, or use what globe export writes");
}

BankRecord read_bank(const Json& entry) {
    return {whole(member(entry, "experts"), "experts"), whole(member(entry, "rank"), "rank"),
            whole(member(entry, "bank"), "bank")};
}

FamilyRecord read_family(const std::string& name, const Json& entry, bool named_banks) {
    FamilyRecord family{whole(member(entry, "experts"), "experts"),
                        whole(member(entry, "p"), "p"),
                        whole(member(entry, "d"), "d"),
                        whole(member(entry, "rank"), "rank"),
                        whole(member(entry, "bank"), "bank"),
                        {},
                        {}};
    require(family.p <= INT64_MAX / 2, "family " + name + " has p " + std::to_string(family.p));
    for (const auto& [tensor, rows] : object(member(entry, "tensors"), "tensors").items()) {
        family.tensors[tensor] = wholes(rows, "a row of the codes");
        if (!named_banks) family.banks[tensor] = name;
    }
    if (!named_banks) return family;
    for (const auto& [tensor, bank] : object(member(entry, "banks"), "banks").items()) {
        family.banks[tensor] = text(bank, "a bank's name");
    }
    return family;
}

Shard read_shard(const Json& entry) {
    Shard shard{text(member(entry, "file"), "a shard's file"), {}};
    const std::string ending = ".safetensors";
    const bool plain = shard.file.find_first_of(std::string("/\0", 2)) == std::string::npos;
    require(plain && shard.file.size() > ending.size() &&
                shard.file.compare(shard.file.size() - ending.size(), ending.size(), ending) == 0,
            "shard " + shard.file + " is not a safetensors file in the directory");
    for (const auto& told : object(member(entry, "metadata"), "metadata")) text(told, "metadata");
    for (const auto& [name, tensor] : object(member(entry, "tensors"), "tensors").items()) {
        require(!tensor.contains("encoded"), "tensor " + name + " is stored as codes");
        shard.tensors[name] = {text(member(tensor, "dtype"), "dtype"),
                               wholes(member(tensor, "shape"), "shape")};
    }
    return shard;
}

// Every family has as many experts, atoms and rows as its banks and tensors have.
void check_families(const Manifest& manifest) {
    std::map<std::string, std::vector<std::int64_t>> rows;
    for (const auto& [name, bank] : manifest.banks) rows[name] = {};
    for (std::size_t f = 0; f < manifest.families.size(); ++f) {
        if (!manifest.families[f]) continue;
        const FamilyRecord& family = *manifest.families[f];
        const std::string told = std::string("family ") + family_names[f];
        std::set<std::string> held;
        std::int64_t experts = 0, atoms = 0;
        require(family.banks.size() == family.tensors.size(), told + " has banks for tensors of others");
        for (const auto& [tensor, numbers] : family.tensors) {
            const auto bank = family.banks.find(tensor);
            require(bank != family.banks.end(), told + " has no bank for tensor " + tensor);
            require(rows.count(bank->second) == 1, "bank " + bank->second + " is missing");
            auto& found = rows[bank->second];
            found.insert(found.end(), numbers.begin(), numbers.end());
            experts += static_cast<std::int64_t>(numbers.size());
            held.insert(bank->second);
        }
        require(experts == family.experts,
                told + " has " + std::to_string(family.experts) + " experts and the tensors of others");
        for (const std::string& bank : held) {
            const BankRecord& record = manifest.banks.at(bank);
            require(record.rank == family.rank, told + " has rank " + std::to_string(family.rank));
            require(!__builtin_add_overflow(atoms, record.size, &atoms), told + " has atoms beyond counting");
        }
        require(!held.empty() && atoms == family.size,
                told + " has " + std::to_string(family.size) + " atoms");
    }
    for (auto& [name, found] : rows) {
        std::sort(found.begin(), found.end());
        const std::int64_t count = manifest.banks.at(name).experts;
        bool each = static_cast<std::int64_t>(found.size()) == count;
        for (std::size_t i = 0; each && i < found.size(); ++i)
            each = found[i] == static_cast<std::int64_t>(i);
        require(each,
                "bank " + name + " has " + std::to_string(count) + " experts and the tensors of others");
    }
}

bool holds(const std::optional<FamilyRecord>& family, const std::string& tensor) {
    return family && family->tensors.count(tensor) == 1;
}

}  // namespace

Manifest read_manifest(const std::string& path, std::string_view content) {
    const Json json = parse_json(content);
    check_version(path, json);
    const bool named_banks = json["format_version"] != 1;
    const Json& source = member(json, "source");
    Manifest manifest{text(member(source, "layout"), "layout"), {}, {}, {}};
    for (const auto& [name, entry] : object(member(json, "families"), "families").items()) {
        const auto* known = std::find(std::begin(family_names), std::end(family_names), name);
        require(known != std::end(family_names), "family " + name + " is none of gate, up and down");
        const auto place = static_cast<std::size_t>(known - family_names);
        manifest.families[place] = read_family(name, entry, named_banks);
        if (!named_banks) manifest.banks[name] = read_bank(entry);
    }
    require(!json["families"].empty(), "there are no families");
    if (named_banks) {
        for (const auto& [name, entry] : object(member(json, "banks"), "banks").items()) {
            manifest.banks[name] = read_bank(entry);
        }
    }
    const Json& shards = member(source, "shards");
    require(shards.is_array(), "shards are no list");
    for (const Json& entry : shards) manifest.shards.push_back(read_shard(entry));
    const Json& metadata = member(source, "index_metadata");
    const bool single = manifest.shards.size() == 1 && manifest.shards[0].file == "model.safetensors";
    require(metadata.is_object() || (metadata.is_null() && single), "index_metadata is no object");
    check_families(manifest);
    return manifest;
}

std::vector<Promise> promised(const Manifest& manifest, const std::string& tensor,
                              const SourceTensor& source) {
    const auto& families = manifest.families;
    const bool down = holds(families[2], tensor);
    const bool gate_or_up = holds(families[0], tensor) || holds(families[1], tensor);
    if (!down && !gate_or_up) return {{tensor, source.dtype, source.shape}};
    require(!(down && gate_or_up), "tensor " + tensor + " is in two families");
    const FamilyRecord& family = down                         ? *families[2]
                                 : holds(families[0], tensor) ? *families[0]
                                                              : *families[1];
    const bool fused = source.shape.size() == 3;
    require(fused || source.shape.size() == 2, "tensor " + tensor + " has another shape than experts have");
    const std::int64_t rows = source.shape[source.shape.size() - 2], columns = source.shape.back();
    const bool together = fused && !down;
    const bool fits = down ? rows == family.d && columns == family.p
                           : rows == (together ? 2 : 1) * family.p && columns == family.d;
    require(fits, "tensor " + tensor + " has another shape than its family");
    require(source.dtype == "BF16" || source.dtype == "F16" || source.dtype == "F32",
            "tensor " + tensor + " has dtype " + source.dtype);
    require(together || !(holds(families[0], tensor) && holds(families[1], tensor)),
            "tensor " + tensor + " is in two families");
    std::vector<Promise> found;
    const auto shape = [&](std::int64_t a, std::int64_t b) {
        return fused ? std::vector<std::int64_t>{source.shape[0], a, b} : std::vector<std::int64_t>{a, b};
    };
    for (std::size_t f = 0; f < families.size(); ++f) {
        if (holds(families[f], tensor)) {
            const auto count = static_cast<std::int64_t>(families[f]->tensors.at(tensor).size());
            require(count == (fused ? source.shape[0] : 1),
                    "tensor " + tensor + " has " + std::to_string(count) + " rows of the codes");
            found.push_back({left_name(tensor, f), "BF16", shape(family.p, families[f]->rank)});
        } else if (together && f != 2) {
            found.push_back({rest_name(tensor, f), source.dtype, shape(family.p, family.d)});
        }
    }
    return found;
}

}  // namespace globe::detail
