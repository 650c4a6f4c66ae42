// What an expert of a factored checkpoint makes of its tokens, and a cache of composed mixtures.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "globe/export.h"
#include "globe/factored.hpp"
#include "globe/view.hpp"

namespace globe {

struct ExpertId {
    std::int64_t layer, expert;
};

// The mixture of one expert, rank x width in the dtype of its cache.
class Mixture;

// Mixtures within a budget of bytes; the least recently used make room. A mixture above the budget is handed
// out and not kept. Threads that miss the same mixture at the same time each compose it, and the first one is
// kept: none waits for another. Any number of threads and checkpoints may use one.
class GLOBE_API ExpertCache {
  public:
    static constexpr std::size_t unlimited = SIZE_MAX;

    struct Stats {
        std::int64_t hits, misses, evictions, entries;  // entries: held now; the others since made or cleared
        std::size_t bytes, budget;
    };
    struct Key {
        std::uint64_t checkpoint;  // FactoredCheckpoints are numbered as they are opened
        std::int64_t bank, row;
    };

    // In float32 a cache changes no bit of what experts compute; in bfloat16 it holds twice as many.
    explicit ExpertCache(std::size_t budget = unlimited, DType dtype = DType::float32);
    ~ExpertCache();
    ExpertCache(const ExpertCache&) = delete;
    ExpertCache& operator=(const ExpertCache&) = delete;

    // The mixture of a factored matrix, composed where it is not held; it lives as long as the pointer.
    std::shared_ptr<const Mixture> get(const FactoredCheckpoint& checkpoint, const ExpertMatrix& matrix,
                                       int threads = 0);

    void resize(std::size_t budget);  // what is held above it is dropped
    void clear();                     // drops all and starts counting anew
    std::vector<Key> keys() const;    // what is held, the least recently used first
    Stats stats() const;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

// The numbers of a mixture.
GLOBE_API ConstMatrixView view(const Mixture& mixture);

enum class Activation { silu, gelu, gelu_tanh, relu };

struct ExpertOptions {
    Activation activation = Activation::silu;
    ExpertCache* cache =
        nullptr;      // where mixtures are taken from; null: composed piece by piece, nothing is kept
    int threads = 0;  // 0 = one per hardware thread
};

// Memory of the caller that a call works in.
struct Workspace {
    void* data;
    std::size_t bytes;
};

// The bytes that a workspace needs for calls of up to so many tokens on any expert of the checkpoint.
GLOBE_API std::size_t expert_workspace(const FactoredCheckpoint& checkpoint, std::int64_t tokens,
                                       int threads = 0);

// out[t, :] = down(act(gate x_t) * (up x_t)) for the tokens x_t that go to one expert
//
// tokens     n x d, any dtype
// out        n x d, any dtype; must not overlap the tokens
//
// Mixtures are not formed but multiplied as they are composed, a few rows or columns at a time. Everything is
// float32 between the tokens and the output, but for sums inside runs of 512 products, which are added in
// float64. What comes out for a token depends neither on the other tokens nor on the number of threads.
// Nothing is allocated, but for what a cache keeps and for the threads of the pool at first use. Throws
// std::invalid_argument, naming the argument, where a shape, the workspace or the expert does not fit.
GLOBE_API void expert_forward(const FactoredCheckpoint& checkpoint, ExpertId expert,
                              const ConstMatrixView& tokens, const MatrixView& out,
                              const Workspace& workspace, const ExpertOptions& options = {});

}  // namespace globe
