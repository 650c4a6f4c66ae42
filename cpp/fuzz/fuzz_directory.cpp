// A whole directory of which one file is the input, the first byte saying which: refused, or every expert
// runs.
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "../tests/tiny.hpp"
#include "checkpoint/state.hpp"
#include "globe/expert.hpp"

namespace {

// Opens the files in memory under the public class.
globe::FactoredCheckpoint open(const globe::tests::Files& files) {
    const auto read = [&files](const std::string& name) -> globe::detail::Bytes {
        const auto found = files.find(name);
        if (found == files.end()) throw globe::CheckpointError(name + ": missing");
        const auto copy = std::make_shared<const std::string>(found->second);
        return {copy, reinterpret_cast<const unsigned char*>(copy->data()), copy->size()};
    };
    return globe::FactoredCheckpoint(globe::detail::open_state("input", read));
}

void run(const globe::FactoredCheckpoint& opened) {
    const std::int64_t hidden = opened.hidden_size();
    const std::vector<float> tokens(static_cast<std::size_t>(2 * hidden), 0.5F);
    std::vector<float> out(tokens.size());
    std::vector<unsigned char> workspace(globe::expert_workspace(opened, 2, 1));
    globe::ExpertOptions options;
    options.threads = 1;
    for (const std::int64_t layer : opened.layers()) {
        for (std::int64_t expert = 0; expert < opened.experts(layer); ++expert) {
            globe::expert_forward(opened, {layer, expert}, {tokens.data(), 2, hidden, globe::DType::float32},
                                  {out.data(), 2, hidden, globe::DType::float32},
                                  {workspace.data(), workspace.size()}, options);
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const globe::tests::Files whole = globe::tests::tiny_directory();
    if (size == 0) return 0;
    globe::tests::Files files = whole;
    auto changed = std::next(files.begin(), data[0] % static_cast<std::ptrdiff_t>(files.size()));
    changed->second.assign(reinterpret_cast<const char*>(data) + 1, size - 1);
    try {
        run(open(files));
    } catch (const globe::CheckpointError&) {
    }
    return 0;
}
