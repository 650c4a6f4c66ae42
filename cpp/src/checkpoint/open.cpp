// From the files of a directory to its banks and experts.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "checkpoint/json.hpp"
#include "checkpoint/layouts.hpp"
#include "checkpoint/manifest.hpp"
#include "checkpoint/names.hpp"
#include "checkpoint/state.hpp"

namespace globe::detail {
namespace {

using State = FactoredCheckpoint::State;

std::string_view text_of(const Bytes& file) {
    return {reinterpret_cast<const char*>(file.data), static_cast<std::size_t>(file.size)};
}

// A file of JSON; what is wrong in it is said with its name.
template <class Use>
auto with_json(const std::string& path, const char* remedy, const Use& use) {
    try {
        return use();
    } catch (const Damaged& damaged) {
        throw CheckpointError(path + ": damaged (" + damaged.what() + "); " + remedy);
    }
}

void add_file(State& state, const std::string& name, const ReadFile& read) {
    Bytes bytes = read(name);
    auto tensors = read_header(state.directory + "/" + name, bytes);
    state.files.push_back({name, std::move(bytes), std::move(tensors)});
    const State::File& file = state.files.back();
    for (const StoredTensor& tensor : file.tensors) {
        if (!state.places.emplace(tensor.name, state.tensors.size()).second) {
            throw CheckpointError(state.directory + ": tensor " + tensor.name +
                                  " is in two files; compress again");
        }
        state.tensors.push_back({tensor.name, tensor.dtype, file.name, tensor.shape,
                                 file.bytes.data + tensor.first, static_cast<std::size_t>(tensor.bytes)});
    }
}

std::string shape_of(const std::vector<std::int64_t>& shape) {
    std::string told;
    for (const std::int64_t extent : shape) told += (told.empty() ? "" : ", ") + std::to_string(extent);
    return "[" + told + "]";
}

// A tensor that must be there, in that file.
const Tensor& expect(const State& state, const std::string& file, const Promise& promise) {
    const auto place = state.places.find(promise.name);
    const Tensor* found = place == state.places.end() ? nullptr : &state.tensors[place->second];
    if (found != nullptr && found->file != file) found = nullptr;
    if (found == nullptr || found->dtype != promise.dtype || found->shape != promise.shape) {
        const std::string told =
            found == nullptr ? "missing" : std::string(found->dtype) + " " + shape_of(found->shape);
        throw CheckpointError(state.directory + "/" + file + ": tensor " + promise.name + " is " + told +
                              ", " + manifest_file + " promises " + promise.dtype + " " +
                              shape_of(promise.shape) + "; compress again");
    }
    return *found;
}

// Its data, in a copy where they do not lie as its entries must.
const void* data_of(State& state, const Tensor& tensor, std::size_t entry) {
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % entry == 0 || tensor.bytes == 0) return tensor.data;
    state.aligned.emplace_back((tensor.bytes + 7) / 8);
    std::memcpy(state.aligned.back().data(), tensor.data, tensor.bytes);
    return state.aligned.back().data();
}

[[noreturn]] void damaged(const State& state, const Tensor& tensor, const std::string& expected) {
    throw CheckpointError(state.directory + "/" + std::string(tensor.file) + ": tensor " +
                          std::string(tensor.name) + " is damaged; expected " + expected +
                          ": compress again");
}

// Offsets, indices and values of codes with `atoms` columns.
CsrView open_codes(State& state, const std::string& bank, const BankRecord& record) {
    const auto part = [&bank](const char* name) { return bank_tensor(bank, name); };
    const auto listed = state.places.find(part("codes.indices"));
    const auto& shape =
        listed != state.places.end() ? state.tensors[listed->second].shape : std::vector<std::int64_t>{};
    const std::int64_t nonzeros = shape.empty() ? 0 : shape[0];
    const Tensor& indptr = expect(state, bank_file, {part("codes.indptr"), "I32", {record.experts + 1}});
    const Tensor& indices = expect(state, bank_file, {part("codes.indices"), "I32", {nonzeros}});
    const Tensor& values = expect(state, bank_file, {part("codes.values"), "F32", {nonzeros}});

    std::vector<std::int32_t> stored(static_cast<std::size_t>(record.experts + 1));
    std::memcpy(stored.data(), indptr.data, indptr.bytes);
    state.offsets.emplace_back(stored.begin(), stored.end());
    const auto& offsets = state.offsets.back();
    if (offsets.front() != 0 || offsets.back() != nonzeros ||
        !std::is_sorted(offsets.begin(), offsets.end())) {
        damaged(state, indptr, "ascending offsets from 0 to " + std::to_string(nonzeros));
    }
    const auto* columns = static_cast<const std::int32_t*>(data_of(state, indices, 4));
    const auto* numbers = static_cast<const float*>(data_of(state, values, 4));
    for (std::int64_t k = 0; k < nonzeros; ++k) {
        if (columns[k] < 0 || columns[k] >= record.size) {
            damaged(state, indices, "atoms from 0 to " + std::to_string(record.size - 1));
        }
        if (!std::isfinite(numbers[k])) damaged(state, values, "finite values");
    }
    return {offsets.data(), columns, numbers, record.experts, record.size, nonzeros};
}

// The width of a bank's atoms is that of the families that use it.
void open_bank(State& state, const std::string& name, const BankRecord& record, std::int64_t width) {
    const Tensor& atoms =
        expect(state, bank_file, {bank_tensor(name, "atoms"), "BF16", {record.size, record.rank, width}});
    const auto* bits = static_cast<const std::uint16_t*>(data_of(state, atoms, 2));
    const std::size_t count = atoms.bytes / 2;
    if (std::any_of(bits, bits + count, [](std::uint16_t x) { return (x & 0x7F80U) == 0x7F80U; })) {
        damaged(state, atoms, "finite values");
    }
    const CsrView codes = open_codes(state, name, record);
    state.banks.push_back(
        {name, record.rank, width, {bits, record.size, record.rank * width, DType::bfloat16}, codes});
}

void open_banks(State& state, const Manifest& manifest) {
    std::map<std::string, std::set<std::int64_t>> widths;
    for (const auto& family : manifest.families) {
        if (!family) continue;
        for (const auto& [tensor, bank] : family->banks) widths[bank].insert(family->d);
    }
    for (const auto& [name, record] : manifest.banks) {
        require(widths[name].size() == 1, "bank " + name + " has families of no one width");
        open_bank(state, name, record, *widths[name].begin());
    }
}

// The files hold what globe.json promises, and nothing else.
void check_shards(const State& state, const Manifest& manifest) {
    std::map<std::string, std::size_t> missing;
    for (std::size_t f = 0; f < 3; ++f) {
        if (!manifest.families[f]) continue;
        for (const auto& [tensor, rows] : manifest.families[f]->tensors) missing[tensor] = f;
    }
    std::set<std::string_view> unnamed;
    for (const State::File& file : state.files) {
        if (file.name == bank_file) continue;
        for (const StoredTensor& tensor : file.tensors) unnamed.insert(tensor.name);
    }
    for (const Shard& shard : manifest.shards) {
        for (const auto& [tensor, source] : shard.tensors) {
            for (const Promise& promise : promised(manifest, tensor, source)) {
                unnamed.erase(expect(state, shard_name(shard.file), promise).name);
            }
            missing.erase(tensor);
        }
    }
    if (!unnamed.empty()) require(false, "it does not name tensor " + std::string(*unnamed.begin()));
    if (!missing.empty()) require(false, "no shard has tensor " + missing.begin()->first);
}

// The index names every tensor, in the file that holds it.
void check_index(const State& state, const Json& index) {
    const Json& named = object(member(index, "weight_map"), "weight_map");
    for (const auto& [tensor, file] : named.items()) {
        const auto place = state.places.find(tensor);
        const std::string told = text(file, "a file of weight_map");
        require(place != state.places.end() && state.tensors[place->second].file == told,
                "tensor " + tensor + " is not in " + told);
    }
    for (const Tensor& tensor : state.tensors) {
        if (named.contains(tensor.name)) continue;
        require(false, "weight_map does not name tensor " + std::string(tensor.name));
    }
}

DType dtype_of(const Tensor& tensor) {
    if (tensor.dtype == "F32") return DType::float32;
    if (tensor.dtype == "F16") return DType::float16;
    require(tensor.dtype == "BF16", "tensor " + std::string(tensor.name) + " has dtype " +
                                        std::string(tensor.dtype) + "; expected BF16, F16 or F32");
    return DType::bfloat16;
}

// Rows [first, first + rows) of entry `index` of a tensor of two or three axes.
ConstMatrixView matrix_of(State& state, const Tensor& tensor, std::int64_t index, std::int64_t first,
                          std::int64_t rows) {
    const DType dtype = dtype_of(tensor);
    const std::int64_t all = tensor.shape[tensor.shape.size() - 2], columns = tensor.shape.back();
    const auto* data = static_cast<const unsigned char*>(data_of(state, tensor, size_of(dtype)));
    const std::int64_t skipped = (index * all + first) * columns;
    return {data + skipped * static_cast<std::int64_t>(size_of(dtype)), rows, columns, dtype};
}

struct Source {
    const std::string& name;
    const SourceTensor& tensor;
    std::size_t family;
    Place place;
};

// The experts of a family that a source tensor holds.
std::vector<ExpertMatrix> matrices_of(State& state, const Manifest& manifest, const Source& source) {
    const auto at = [&state](const std::string& name) { return state.tensors[state.places.at(name)]; };
    const auto& shape = source.tensor.shape;
    const bool all = source.place.expert < 0;
    require(shape.size() == (all ? 3U : 2U), "tensor " + source.name + " has shape " + shape_of(shape));
    require(std::count(shape.begin(), shape.end(), 0) == 0, "tensor " + source.name + " has no weights");
    const std::int64_t count = all ? shape[0] : 1, rows = shape[shape.size() - 2];
    const bool halves = all && source.family != 2;
    require(!halves || rows % 2 == 0, "tensor " + source.name + " has shape " + shape_of(shape));
    std::vector<ExpertMatrix> found;
    const auto& family = manifest.families[source.family];
    if (family && family->tensors.count(source.name) == 1) {
        const Tensor left = at(left_name(source.name, source.family));
        const std::string& name = family->banks.at(source.name);
        const auto bank = std::distance(manifest.banks.begin(), manifest.banks.find(name));
        for (std::int64_t e = 0; e < count; ++e) {
            const std::int64_t row = family->tensors.at(source.name)[static_cast<std::size_t>(e)];
            found.push_back({matrix_of(state, left, e, 0, family->p), bank, row});
        }
        return found;
    }
    const bool rest = halves && state.places.count(rest_name(source.name, source.family)) == 1;
    const Tensor dense = at(rest ? rest_name(source.name, source.family) : source.name);
    const std::int64_t height = halves ? rows / 2 : rows;
    const std::int64_t first = halves && !rest && source.family == 1 ? height : 0;
    for (std::int64_t e = 0; e < count; ++e) found.push_back({matrix_of(state, dense, e, first, height)});
    return found;
}

// The matrices of a layer by family and number, before it is known that none is missing.
using Found = std::array<std::map<std::int64_t, ExpertMatrix>, 3>;

// A layer's matrices, of which each family must have the same numbers, p x d and d x p; experts follow each
// other in the order of their numbers, which may leave some out.
State::Layer checked(const State& state, std::int64_t number, const Found& found) {
    const std::string told = "layer " + std::to_string(number);
    State::Layer layer;
    for (std::size_t f = 0; f < 3; ++f) {
        const auto same = [](const auto& one, const auto& other) { return one.first == other.first; };
        require(!found[f].empty() &&
                    std::equal(found[f].begin(), found[f].end(), found[0].begin(), found[0].end(), same),
                told + " has not all experts of family " + family_names[f]);
        for (const auto& [expert, matrix] : found[f]) {
            const ExpertMatrix& gate = found[0].begin()->second;
            const bool across = f == 2 && !matrix.factored();
            const std::int64_t p = across ? matrix.stored.cols : matrix.stored.rows;
            const std::int64_t d = across ? matrix.stored.rows : state.width_of(matrix);
            require(p == gate.stored.rows && d == state.width_of(gate),
                    told + " has experts of more than one shape, " + family_names[f] + " " +
                        std::to_string(expert));
            layer[f].push_back(matrix);
        }
    }
    return layer;
}

void place_all(State& state, const Manifest& manifest, std::int64_t layers) {
    const Layout layout = layout_of(manifest.layout);
    std::map<std::int64_t, Found> found;
    for (const Shard& shard : manifest.shards) {
        for (const auto& [name, tensor] : shard.tensors) {
            for (std::size_t f = 0; f < 3; ++f) {
                const auto place = layout.place(f, name);
                const bool factored = manifest.families[f] && manifest.families[f]->tensors.count(name) == 1;
                require(place || !factored, "tensor " + name + " is not named as layout " + manifest.layout);
                if (!place || place->layer >= layers) continue;
                std::int64_t expert = std::max<std::int64_t>(0, place->expert);
                for (const ExpertMatrix& matrix : matrices_of(state, manifest, {name, tensor, f, *place})) {
                    require(found[place->layer][f].emplace(expert++, matrix).second,
                            "tensor " + name + " holds an expert that another has");
                }
            }
        }
    }
    for (const auto& [number, matrices] : found) {
        state.experts[number] = checked(state, number, matrices);
        const ExpertMatrix& gate = state.experts[number][0][0];
        state.layers.push_back(number);
        state.p = std::max(state.p, gate.stored.rows);
        require(state.layers.size() == 1 || state.d == state.width_of(gate),
                "layer " + std::to_string(number) + " has experts of another width than layer " +
                    std::to_string(state.layers[0]));
        state.d = state.width_of(gate);
    }
    for (const Bank& bank : state.banks) {
        state.rank = std::max(state.rank, bank.rank);
        for (std::int64_t i = 0; i < bank.codes.rows; ++i) {
            state.support = std::max(state.support, bank.codes.indptr[i + 1] - bank.codes.indptr[i]);
        }
    }
}

// The number of layers that config.json states; later ones predict further tokens and are left alone.
std::int64_t stated_layers(const Json& config) {
    const Json* found = &config;
    std::int64_t layers = INT64_MAX;
    if (config.contains("num_hidden_layers"))
        layers = whole(config["num_hidden_layers"], "num_hidden_layers");
    for (const char* name : {"thinker_config", "text_config", "language_config", "llm_config"}) {
        const auto inner = found->find(name);
        if (inner == found->end() || !inner->is_object()) continue;
        found = &*inner;
        if (found->contains("num_hidden_layers")) {
            layers = whole((*found)["num_hidden_layers"], "num_hidden_layers");
        }
    }
    return layers;
}

// The table of config.json, by which transformers runs the experts, says the same as globe.json.
void check_table(const State& state, const Json& config) {
    const auto ours = config.find("quantization_config");
    if (ours == config.end() || !ours->is_object() || !ours->contains("experts")) return;
    std::size_t told = 0, held = 0;
    for (const auto& [family, layers] : object((*ours)["experts"], "experts").items()) {
        const auto* known = std::find(std::begin(family_names), std::end(family_names), family);
        require(known != std::end(family_names), "experts has family " + family);
        const auto f = static_cast<std::size_t>(known - family_names);
        for (const auto& [number, place] : object(layers, "a family of experts").items()) {
            const std::string where = "experts of layer " + number + ", family " + family;
            require(place.is_array() && place.size() == 3, where + ", have no place");
            const std::int64_t first = whole(place[1], "a row"), step = whole(place[2], "a step");
            const auto is = [&wanted = number](const auto& entry) {
                return std::to_string(entry.first) == wanted;
            };
            const auto layer = std::find_if(state.experts.begin(), state.experts.end(), is);
            require(layer != state.experts.end(), where + ", are not there");
            const auto& matrices = layer->second[f];
            for (std::size_t e = 0; e < matrices.size(); ++e) {
                const ExpertMatrix& matrix = matrices[e];
                require(
                    matrix.factored() &&
                        state.banks[static_cast<std::size_t>(matrix.bank)].name == text(place[0], "a bank") &&
                        matrix.row >= first &&
                        (e == 0 ? matrix.row == first : matrix.row - matrices[e - 1].row == step),
                    where + ", are elsewhere in " + manifest_file);
            }
            ++told;
        }
    }
    for (const auto& [number, layer] : state.experts) {
        for (const auto& matrices : layer) held += matrices[0].factored() ? 1 : 0;
    }
    require(told == held, "experts leaves out a layer that is factored");
}

}  // namespace

std::unique_ptr<State> open_state(const std::string& directory, const ReadFile& read) {
    static std::atomic<std::uint64_t> opened{0};
    auto state = std::make_unique<State>();
    state->number = ++opened;
    state->directory = directory;
    const std::string manifest_path = directory + "/" + manifest_file;
    const char* again = "compress the source again";
    const Bytes manifest_bytes = read(manifest_file);
    const auto manifest = with_json(manifest_path, again,
                                    [&] { return read_manifest(manifest_path, text_of(manifest_bytes)); });
    for (const Shard& shard : manifest.shards) add_file(*state, shard_name(shard.file), read);
    add_file(*state, bank_file, read);
    const auto config_path = directory + "/config.json";
    const Bytes config_bytes = read("config.json");
    const auto config =
        with_json(config_path, again, [&] { return parse_json(without_infinities(text_of(config_bytes))); });
    const auto layers = with_json(config_path, again, [&] { return stated_layers(config); });
    with_json(manifest_path, again, [&] {
        open_banks(*state, manifest);
        check_shards(*state, manifest);
        place_all(*state, manifest, layers);
    });
    const Bytes index_bytes = read(index_file);
    with_json(directory + "/" + index_file, again,
              [&] { check_index(*state, parse_json(text_of(index_bytes))); });
    with_json(config_path, again, [&] { check_table(*state, config); });
    for (std::size_t f = 0; f < 3; ++f) {
        if (manifest.families[f]) state->families.push_back(static_cast<Family>(f));
    }
    return state;
}

}  // namespace globe::detail
