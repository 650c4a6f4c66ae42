// compose_expert OUT FAMILY LAYER EXPERT RESULT
//
// Writes the mixture of one expert of a factored checkpoint, sum_j codes[EXPERT, j] * atoms[j], as raw
// float32, row after row, and prints its shape. Of the bank it reads only the atoms that this expert uses,
// once it is checked.
#include <globe/globe.hpp>

#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

globe::Family family_of(const std::string& name) {
    if (name == "gate") return globe::Family::gate;
    if (name == "up") return globe::Family::up;
    if (name == "down") return globe::Family::down;
    throw std::invalid_argument("FAMILY: found " + name + "; expected gate, up or down");
}

void compose_expert(char** arguments) {
    const globe::FactoredCheckpoint checkpoint(arguments[1]);
    const auto& matrix =
        checkpoint.matrix(family_of(arguments[2]), std::stoll(arguments[3]), std::stoll(arguments[4]));
    if (!matrix.factored()) throw std::invalid_argument("FAMILY: this expert's matrix is dense");
    const globe::Bank& bank = checkpoint.banks()[static_cast<std::size_t>(matrix.bank)];
    std::vector<float> mixture(static_cast<std::size_t>(bank.rank * bank.width));
    checkpoint.compose(matrix, {mixture.data(), bank.rank, bank.width, globe::DType::float32});

    const std::string result = arguments[5];
    std::ofstream out(result, std::ios::binary);
    out.write(reinterpret_cast<const char*>(mixture.data()),
              static_cast<std::streamsize>(mixture.size() * sizeof(float)));
    if (!out.flush()) throw std::runtime_error(result + ": cannot be written");
    const auto* support = bank.codes.indptr + matrix.row;
    std::printf("%s: %lld x %lld float32, %lld atoms, %s\n", result.c_str(),
                static_cast<long long>(bank.rank), static_cast<long long>(bank.width),
                static_cast<long long>(support[1] - support[0]), globe::active_isa().c_str());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 6) {
        std::fprintf(stderr, "usage: compose_expert OUT FAMILY LAYER EXPERT RESULT\n");
        return 2;
    }
    try {
        compose_expert(argv);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "compose_expert: error: %s\n", error.what());
        return 1;
    }
    return 0;
}
