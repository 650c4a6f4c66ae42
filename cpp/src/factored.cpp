#include "globe/factored.hpp"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "checkpoint/names.hpp"
#include "checkpoint/state.hpp"
#include "globe/compose.hpp"

namespace globe {
namespace {

std::unique_ptr<FactoredCheckpoint::State> open_directory(const std::string& directory) {
    const std::filesystem::path root(directory);
    std::error_code ignored;
    if (!std::filesystem::exists(root / detail::manifest_file, ignored)) {
        throw CheckpointError(directory + ": no " + detail::manifest_file +
                              " found; expected a directory written by globe compress");
    }
    if (!std::filesystem::exists(root / "config.json", ignored)) {
        throw CheckpointError(
            directory + ": config.json is missing, so the run that wrote it did not finish; run it again");
    }
    return detail::open_state(
        directory, [&root](const std::string& name) { return detail::map_file((root / name).string()); });
}

}  // namespace

CheckpointError::~CheckpointError() = default;

FactoredCheckpoint::FactoredCheckpoint(const std::string& directory) : state_(open_directory(directory)) {}
FactoredCheckpoint::FactoredCheckpoint(std::unique_ptr<State> state) : state_(std::move(state)) {}
FactoredCheckpoint::~FactoredCheckpoint() = default;
FactoredCheckpoint::FactoredCheckpoint(FactoredCheckpoint&&) noexcept = default;
FactoredCheckpoint& FactoredCheckpoint::operator=(FactoredCheckpoint&&) noexcept = default;

const std::vector<Bank>& FactoredCheckpoint::banks() const {
    return state_->banks;
}

const std::vector<Tensor>& FactoredCheckpoint::tensors() const {
    return state_->tensors;
}

const Tensor* FactoredCheckpoint::find(std::string_view name) const {
    const auto found = state_->places.find(name);
    return found == state_->places.end() ? nullptr : &state_->tensors[found->second];
}

const std::vector<std::int64_t>& FactoredCheckpoint::layers() const {
    return state_->layers;
}

std::int64_t FactoredCheckpoint::experts(std::int64_t layer) const {
    const auto found = state_->experts.find(layer);
    return found == state_->experts.end() ? 0 : static_cast<std::int64_t>(found->second[0].size());
}

std::int64_t FactoredCheckpoint::hidden_size() const {
    return state_->d;
}

const std::vector<Family>& FactoredCheckpoint::families() const {
    return state_->families;
}

const ExpertMatrix& FactoredCheckpoint::matrix(Family family, std::int64_t layer, std::int64_t expert) const {
    const auto f = static_cast<std::size_t>(family);
    if (f > 2) throw std::invalid_argument("family: found " + std::to_string(f) + "; expected 0, 1 or 2");
    const std::int64_t count = experts(layer);
    if (count == 0) {
        throw std::invalid_argument("layer: found " + std::to_string(layer) + "; expected one of the " +
                                    std::to_string(layers().size()) + " layers that have routed experts");
    }
    if (expert < 0 || expert >= count) {
        throw std::invalid_argument("expert: found " + std::to_string(expert) + "; expected 0 to " +
                                    std::to_string(count - 1));
    }
    return state_->experts.at(layer)[f][static_cast<std::size_t>(expert)];
}

void FactoredCheckpoint::compose(const ExpertMatrix& matrix, const MatrixView& out, int threads) const {
    if (!matrix.factored()) throw std::invalid_argument("matrix: found a dense one; expected a factored one");
    const Bank& bank = state_->banks.at(static_cast<std::size_t>(matrix.bank));
    if (matrix.row < 0 || matrix.row >= bank.codes.rows) {
        throw std::invalid_argument("matrix: found row " + std::to_string(matrix.row) + "; expected 0 to " +
                                    std::to_string(bank.codes.rows - 1));
    }
    if (out.rows != bank.rank || out.cols != bank.width || (out.stride != 0 && out.stride != out.cols)) {
        throw std::invalid_argument("out: found shape (" + std::to_string(out.rows) + ", " +
                                    std::to_string(out.cols) + "); expected (" + std::to_string(bank.rank) +
                                    ", " + std::to_string(bank.width) + ") without gaps");
    }
    const std::int64_t *offsets = bank.codes.indptr + matrix.row, first = offsets[0];
    const std::int64_t row[] = {0, offsets[1] - first};
    const CsrView codes{row,   bank.codes.indices + first, bank.codes.values + first, 1, bank.codes.cols,
                        row[1]};
    globe::compose(codes, bank.atoms, {out.data, 1, bank.rank * bank.width, out.dtype}, 0.0F, threads);
}

}  // namespace globe
