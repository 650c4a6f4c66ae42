// run_expert OUT TOKENS RESULT
//
// TOKENS holds raw float32 rows of the model's width. Every routed expert of every layer is run on them, one
// after the other, and what they make of them is written to RESULT in the same form.
#include <globe/globe.hpp>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<float> read_numbers(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    std::vector<float> numbers(file ? static_cast<std::size_t>(file.tellg()) / sizeof(float) : 0);
    file.seekg(0);
    file.read(reinterpret_cast<char*>(numbers.data()),
              static_cast<std::streamsize>(numbers.size() * sizeof(float)));
    if (!file) throw std::runtime_error(path + ": cannot be read");
    return numbers;
}

void run(const std::string& directory, const std::string& tokens_file, const std::string& result) {
    const globe::FactoredCheckpoint checkpoint(directory);
    const std::vector<float> tokens = read_numbers(tokens_file);
    std::vector<float> made(tokens.size());
    std::ofstream out(result, std::ios::binary);
    const std::int64_t width = checkpoint.hidden_size();
    const auto count = static_cast<std::int64_t>(tokens.size()) / width;
    std::vector<unsigned char> workspace(globe::expert_workspace(checkpoint, count));
    for (const std::int64_t layer : checkpoint.layers()) {
        for (std::int64_t expert = 0; expert < checkpoint.experts(layer); ++expert) {
            globe::expert_forward(
                checkpoint, {layer, expert}, {tokens.data(), count, width, globe::DType::float32},
                {made.data(), count, width, globe::DType::float32}, {workspace.data(), workspace.size()});
            out.write(reinterpret_cast<const char*>(made.data()),
                      static_cast<std::streamsize>(made.size() * sizeof(float)));
        }
    }
    if (!out.flush()) throw std::runtime_error(result + ": cannot be written");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: run_expert OUT TOKENS RESULT\n");
        return 2;
    }
    try {
        run(argv[1], argv[2], argv[3]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "run_expert: error: %s\n", error.what());
        return 1;
    }
    return 0;
}
