// Opens a directory, damages it in all ways that its checks speak of, and compares mixtures with the
// definition.
#include "globe/factored.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "check.hpp"
#include "tiny.hpp"

namespace {

using globe::Family;
using globe::tests::check;
using globe::tests::Files;
using globe::tests::tiny_directory;
using globe::tests::Written;

float number(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value = 0.0F;
    std::memcpy(&value, &wide, 4);
    return value;
}

void lists_what_is_there(const globe::FactoredCheckpoint& opened) {
    check(opened.layers() == std::vector<std::int64_t>{0, 1}, "layers");
    check(opened.experts(0) == 3 && opened.experts(1) == 3 && opened.experts(2) == 0, "experts of a layer");
    check(opened.families() == std::vector{Family::gate, Family::up}, "families");
    check(opened.hidden_size() == globe::tests::hidden, "hidden size");
    check(opened.banks().size() == 2 && opened.banks()[0].name == "gate", "banks");
    check(opened.find("globe.up.atoms") != nullptr && opened.find("nothing") == nullptr, "tensors by name");
    const auto& up = opened.matrix(Family::up, 1, 2);
    check(up.factored() && up.bank == 1 && up.row == 5 && up.stored.cols == globe::tests::rank,
          "a factored matrix");
    const auto& down = opened.matrix(Family::down, 0, 1);
    check(!down.factored() && down.stored.rows == 7 && down.stored.cols == 5, "a dense matrix");
    const auto* tensor = opened.find("model.layers.0.mlp.experts.1.down_proj.weight");
    const bool same = tensor != nullptr && std::memcmp(tensor->data, down.stored.data, tensor->bytes) == 0;
    check(same, "its numbers");
}

void composes(const globe::FactoredCheckpoint& opened) {
    for (std::int64_t expert = 0; expert < globe::tests::experts; ++expert) {
        const auto& matrix = opened.matrix(Family::gate, 0, expert);
        const globe::Bank& bank = opened.banks()[0];
        std::vector<float> found(static_cast<std::size_t>(bank.rank * bank.width), -1.0F);
        opened.compose(matrix, {found.data(), bank.rank, bank.width, globe::DType::float32});
        const auto* atoms = static_cast<const std::uint16_t*>(bank.atoms.data);
        for (std::size_t t = 0; t < found.size(); ++t) {
            double expected = 0.0;
            for (auto k = bank.codes.indptr[matrix.row]; k < bank.codes.indptr[matrix.row + 1]; ++k) {
                const auto atom = static_cast<std::size_t>(bank.codes.indices[k]);
                expected +=
                    static_cast<double>(bank.codes.values[k]) * number(atoms[atom * found.size() + t]);
            }
            check(std::fabs(found[t] - expected) <= 1e-5, "entry " + std::to_string(t) + " of a mixture");
        }
    }
}

void refuses_arguments(const globe::FactoredCheckpoint& opened) {
    using globe::tests::check_refused;
    check_refused("layer", [&] { opened.matrix(Family::gate, 2, 0); });
    check_refused("expert", [&] { opened.matrix(Family::gate, 0, 3); });
    check_refused("expert", [&] { opened.matrix(Family::gate, 0, -1); });
    check_refused("family", [&] { opened.matrix(static_cast<Family>(3), 0, 0); });
    std::vector<float> out(28);
    const auto into = [&out](std::int64_t r) {
        return globe::MatrixView{out.data(), r, 7, globe::DType::float32};
    };
    check_refused("out", [&] { opened.compose(opened.matrix(Family::gate, 0, 0), into(3)); });
    check_refused("matrix", [&] { opened.compose(opened.matrix(Family::down, 0, 0), into(4)); });
    auto made_up = opened.matrix(Family::gate, 0, 0);
    made_up.row = 6;
    check_refused("matrix", [&] { opened.compose(made_up, into(4)); });
}

// Whatever `from` is in a file becomes `to`; the directory must be refused with these words in one line.
void refuses(const std::string& file, const std::string& from, const std::string& to,
             const std::string& words, Files files = tiny_directory()) {
    const auto at = files[file].find(from);
    check(at != std::string::npos, from + " is in " + file);
    files[file].replace(at, from.size(), to);
    const Written directory(files);
    try {
        const globe::FactoredCheckpoint opened(directory.path());
        check(false, "opened with " + to + " for " + from + " in " + file);
    } catch (const globe::CheckpointError& error) {
        const std::string line = error.what();
        check(line.find(words) != std::string::npos && line.find('\n') == std::string::npos,
              words + ": " + line);
    }
}

// Directories of later versions are refused by what they have that this library does not run.
void refuses_later_versions() {
    const auto later = [](const char* version, const std::string& from, const std::string& to,
                          const std::string& words) {
        Files files = tiny_directory();
        auto& manifest = files["globe.json"];
        const std::string ours = "\"format_version\":2";
        manifest.replace(manifest.find(ours), ours.size(), std::string("\"format_version\":") + version);
        refuses("globe.json", from, to,
                std::string("format version ") + version + words + "; this library reads 1 to 2: run it with",
                files);
    };
    const std::string family = "\"families\":{\"gate\":{", bank = "\"banks\":{\"gate\":{\"exp";
    const std::string tensor = "experts.1.down_proj.weight\":{", which = "model.layers.0.mlp.experts.1.down";
    later("3", family, family + "\"packed\":{\"bits\":4,\"group\":32},",
          ", in which left factors of family gate are packed in integers of 4 bits");
    later("3", bank, "\"banks\":{\"gate\":{\"packed\":{\"bits\":8,\"group\":32},\"exp",
          ", in which atoms of bank gate are packed in integers of 8 bits");
    later("3", family, family + "\"packed\":[4],",
          ", in which left factors of family gate are packed in integers");
    later("3", tensor, tensor + "\"encoded\":{},",
          ", in which tensor " + which + "_proj.weight stays stored as codes");
    later("4", tensor, tensor + "\"transposed\":true,",
          ", in which tensor " + which + "_proj.weight is a stack of [experts, inputs, outputs]");
    later("4", tensor, tensor + "\"interleaved\":true,",
          ", in which tensor " + which + "_proj.weight has rows of gate and up in turns");
    later("3", "\"layout\"", "\"shards_\":3,\"layout\"", "");
    later("3", "\"shards\":[{", "\"shards\":[null,3,{", "");
    later("5", family, family + "\"packed\":{\"bits\":4},", "");
}

void refuses_damage() {
    const char *manifest = "globe.json", *bank = "globe-bank.safetensors", *shard = "globe.safetensors";
    const char *index = "globe.safetensors.index.json", *config = "config.json";
    refuses(manifest, "\"format_version\":2", "\"format_version\":3", "reads 1 to 2");
    refuses(manifest, "\"format_version\":2", "\"format_version\":2.0", "reads 1 to 2");
    refuses(manifest, "\"format_version\":2", "\"format_version\":2,\"format_version\":2", "twice");
    refuses(manifest, "{\"format_version\"", "[\"format_version\"", "not valid JSON");
    refuses(manifest, "\"layout\":\"olmoe\"", "\"layout\":\"nonesuch\"", "layout nonesuch");
    refuses(manifest, "\"gate\":{\"experts\":6,\"p\"", "\"router\":{\"experts\":6,\"p\"", "family router");
    refuses(manifest, "\"p\":5", "\"p\":9223372036854775807", "family gate has p");
    refuses(manifest, "\"p\":5", "\"p\":-5", "not a whole number");
    refuses(manifest, "\"p\":5", "\"p\":4", "another shape than its family");
    refuses(manifest, "[0]", "[1]", "bank gate has 6 experts");
    refuses(manifest, "[0]", "[6]", "bank gate has 6 experts");
    refuses(manifest, "\"model.safetensors\"", "\"../model.safetensors\"", "not a safetensors file");
    refuses(manifest, "\"shape\":[5,7]", "\"shape\":[5,8]", "another shape");
    refuses(manifest, "\"shape\":[7,5]", "\"shape\":[5,7]", "globe.json promises BF16 [5, 7]");
    refuses(bank, "\"globe.gate.atoms\":{\"dtype\":\"BF16\"", "\"globe.gate.atoms\":{\"dtype\":\"F16\" ",
            "promises BF16 [3, 4, 7]");
    refuses(bank, "\"dtype\":\"U8\"", "\"dtype\":\"U9\"", "dtype U9");
    refuses(bank, "\"data_offsets\":[0,1]", "\"data_offsets\":[0,2]", "has 2 bytes, not what U8 [1] takes");
    refuses(bank, "\"data_offsets\":[0,1]", "\"data_offsets\":[1,2]", "starts at byte");
    refuses(bank, "\"data_offsets\":[0,1]", "\"data_offsets\":[1,0]", "header is not valid");
    refuses(bank, "padding", "globe.gate.atoms", "not valid");
    refuses(shard, "layers.0", "layers.7", "promises");
    refuses(index, "\"padding\":\"globe-bank.safetensors\"", "\"padding\":\"globe.safetensors\"", "padding");
    refuses(index, "\"padding\":\"globe-bank.safetensors\",", "", "does not name tensor padding");
    refuses(config, "[\"up\",3,1]", "[\"up\",0,1]", "elsewhere in globe.json");
    refuses(config, "\"num_hidden_layers\":2", "\"num_hidden_layers\":\"2\"", "num_hidden_layers");
    refuses(config, ",\"1\":[\"up\",3,1]", "", "leaves out");
    const float half = 0.125F, infinite = HUGE_VALF;
    const auto bits = [](const void* value) { return std::string(static_cast<const char*>(value), 4); };
    refuses(bank, bits(&half), bits(&infinite), "finite values");
    const std::int32_t pair[] = {5, 8}, fallen[] = {5, 4}, columns[] = {1, 2}, beyond[] = {1, 3};
    const auto eight = [](const void* value) { return std::string(static_cast<const char*>(value), 8); };
    refuses(bank, eight(pair), eight(fallen), "ascending offsets from 0 to 9");
    refuses(bank, eight(columns), eight(beyond), "atoms from 0 to 2");
    for (const char* missing :
         {"globe.json", "config.json", "globe-bank.safetensors", "globe.safetensors.index.json"}) {
        Files files = tiny_directory();
        files.erase(missing);
        const Written directory(files);
        try {
            const globe::FactoredCheckpoint opened(directory.path());
            check(false, std::string("opened without ") + missing);
        } catch (const globe::CheckpointError& error) {
            check(std::string(error.what()).find(missing) != std::string::npos, error.what());
        }
    }
    Files files = tiny_directory();
    files["globe-bank.safetensors"].pop_back();
    refuses("globe.json", "\"format_version\":2", "\"format_version\":0", "reads 1 to 2");
    const Written truncated(files);
    try {
        const globe::FactoredCheckpoint opened(truncated.path());
        check(false, "opened a truncated file");
    } catch (const globe::CheckpointError& error) {
        check(std::string(error.what()).find("truncated") != std::string::npos, error.what());
    }
}

}  // namespace

int main() {
    const Written directory(tiny_directory());
    globe::FactoredCheckpoint first(directory.path());
    const globe::FactoredCheckpoint opened(std::move(first));
    lists_what_is_there(opened);
    globe::tests::on_every_isa([&] { composes(opened); });
    refuses_arguments(opened);
    refuses_damage();
    refuses_later_versions();
    return globe::tests::result();
}
