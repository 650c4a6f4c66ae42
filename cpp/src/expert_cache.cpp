#include <algorithm>
#include <list>
#include <map>
#include <mutex>
#include <tuple>

#include "checkpoint/state.hpp"
#include "globe/expert.hpp"
#include "mixture.hpp"

namespace globe {

ConstMatrixView view(const Mixture& mixture) {
    return mixture.view;
}

struct ExpertCache::State {
    struct Entry {
        Key key;
        std::shared_ptr<const Mixture> mixture;
    };
    struct Before {
        bool operator()(const Key& a, const Key& b) const {
            return std::tie(a.checkpoint, a.bank, a.row) < std::tie(b.checkpoint, b.bank, b.row);
        }
    };

    const DType dtype;
    mutable std::mutex mutex;  // of all below
    std::list<Entry> entries;  // the least recently used first
    std::map<Key, std::list<Entry>::iterator, Before> places;
    Stats stats;

    State(std::size_t budget, DType stored) : dtype(stored), stats{0, 0, 0, 0, 0, budget} {}

    // Null where it is not held; the most recently used now.
    std::shared_ptr<const Mixture> touch(const Key& key) {
        const auto place = places.find(key);
        if (place == places.end()) return nullptr;
        entries.splice(entries.end(), entries, place->second);
        return place->second->mixture;
    }

    void make_room(std::size_t wanted) {
        while (!entries.empty() && (wanted > stats.budget || stats.bytes > stats.budget - wanted)) {
            stats.bytes -= entries.front().mixture->bytes();
            places.erase(entries.front().key);
            entries.pop_front();
            ++stats.evictions;
        }
    }

    void keep(const Key& key, const std::shared_ptr<const Mixture>& mixture) {
        if (mixture->bytes() > stats.budget) return;
        make_room(mixture->bytes());
        entries.push_back({key, mixture});
        places[key] = std::prev(entries.end());
        stats.bytes += mixture->bytes();
    }
};

ExpertCache::ExpertCache(std::size_t budget, DType dtype) : state_(std::make_unique<State>(budget, dtype)) {}
ExpertCache::~ExpertCache() = default;

std::shared_ptr<const Mixture> ExpertCache::get(const FactoredCheckpoint& checkpoint,
                                                const ExpertMatrix& matrix, int threads) {
    const Key key{checkpoint.state().number, matrix.bank, matrix.row};
    {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        if (auto held = state_->touch(key)) {
            ++state_->stats.hits;
            return held;
        }
        ++state_->stats.misses;
    }
    const std::shared_ptr<const Mixture> made = composed(checkpoint, matrix, state_->dtype, threads);
    const std::lock_guard<std::mutex> lock(state_->mutex);
    if (auto held = state_->touch(key)) return held;
    state_->keep(key, made);
    return made;
}

void ExpertCache::resize(std::size_t budget) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stats.budget = budget;
    state_->make_room(0);
}

void ExpertCache::clear() {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->entries.clear();
    state_->places.clear();
    state_->stats = {0, 0, 0, 0, 0, state_->stats.budget};
}

std::vector<ExpertCache::Key> ExpertCache::keys() const {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    std::vector<Key> keys;
    for (const auto& entry : state_->entries) keys.push_back(entry.key);
    return keys;
}

ExpertCache::Stats ExpertCache::stats() const {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    Stats stats = state_->stats;
    stats.entries = static_cast<std::int64_t>(state_->entries.size());
    return stats;
}

}  // namespace globe
