// globe.h, over the C++ API: exceptions end here.
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

#include "globe/expert.hpp"
#include "globe/factored.hpp"
#include "globe/globe.h"
#include "globe/isa.hpp"

struct globe_checkpoint {
    globe::FactoredCheckpoint opened;
};

struct globe_cache {
    globe::ExpertCache held;
};

namespace {

thread_local char last_error[1024] = "";

globe_status failed(globe_status status, const char* message) noexcept {
    std::snprintf(last_error, sizeof last_error, "%s", message);
    return status;
}

template <class Work>
globe_status guarded(const Work& work) noexcept {
    try {
        work();
        return GLOBE_OK;
    } catch (const globe::CheckpointError& error) {
        return failed(GLOBE_BAD_CHECKPOINT, error.what());
    } catch (const std::invalid_argument& error) {
        return failed(GLOBE_INVALID_ARGUMENT, error.what());
    } catch (const std::bad_alloc&) {
        return failed(GLOBE_OUT_OF_MEMORY, "memory: the system gives no more");
    } catch (const std::exception& error) {
        return failed(GLOBE_INTERNAL, error.what());
    } catch (...) {
        return failed(GLOBE_INTERNAL, "an exception of unknown kind");
    }
}

template <class T>
T& given(T* pointer, const char* argument) {
    if (pointer == nullptr) throw std::invalid_argument(std::string(argument) + ": found a null pointer");
    return *pointer;
}

globe::DType dtype_of(std::int32_t dtype, const char* argument) {
    if (dtype < GLOBE_FLOAT32 || dtype > GLOBE_BFLOAT16) {
        throw std::invalid_argument(std::string(argument) + ": found dtype " + std::to_string(dtype) +
                                    "; expected a globe_dtype");
    }
    return static_cast<globe::DType>(dtype);
}

globe::ConstMatrixView view_of(const globe_const_matrix& matrix, const char* argument) {
    return {matrix.data, matrix.rows, matrix.cols, dtype_of(matrix.dtype, argument), matrix.stride};
}

globe::MatrixView view_of(const globe_matrix& matrix, const char* argument) {
    return {matrix.data, matrix.rows, matrix.cols, dtype_of(matrix.dtype, argument), matrix.stride};
}

globe_const_matrix matrix_of(const globe::ConstMatrixView& view) {
    return {view.data, view.rows, view.cols, view.stride, static_cast<std::int32_t>(view.dtype)};
}

// A matrix that the caller may have made up.
globe::ExpertMatrix checked(const globe_checkpoint& checkpoint, const globe_expert_matrix& matrix) {
    const auto banks = static_cast<std::int64_t>(checkpoint.opened.banks().size());
    if (matrix.bank < -1 || matrix.bank >= banks) {
        throw std::invalid_argument("matrix: found bank " + std::to_string(matrix.bank) +
                                    "; expected -1 to " + std::to_string(banks - 1));
    }
    return {view_of(matrix.stored, "matrix"), matrix.bank, matrix.row};
}

}  // namespace

const char* globe_version() {
    return GLOBE_VERSION;
}

const char* globe_last_error() {
    return last_error;
}

const char* globe_active_isa() {
    thread_local std::string name;
    return guarded([] { name = globe::active_isa(); }) == GLOBE_OK ? name.c_str() : nullptr;
}

globe_status globe_open(const char* directory, globe_checkpoint** out) {
    return guarded([&] {
        auto& place = given(out, "out");
        place = new globe_checkpoint{globe::FactoredCheckpoint(&given(directory, "directory"))};
    });
}

void globe_close(globe_checkpoint* checkpoint) {
    delete checkpoint;
}

globe_status globe_layers(const globe_checkpoint* checkpoint, const std::int64_t** layers,
                          std::int64_t* count) {
    return guarded([&] {
        const auto& found = given(checkpoint, "checkpoint").opened.layers();
        given(layers, "layers") = found.data();
        given(count, "count") = static_cast<std::int64_t>(found.size());
    });
}

globe_status globe_experts(const globe_checkpoint* checkpoint, std::int64_t layer, std::int64_t* count) {
    return guarded([&] { given(count, "count") = given(checkpoint, "checkpoint").opened.experts(layer); });
}

globe_status globe_hidden_size(const globe_checkpoint* checkpoint, std::int64_t* size) {
    return guarded([&] { given(size, "size") = given(checkpoint, "checkpoint").opened.hidden_size(); });
}

globe_status globe_bank_count(const globe_checkpoint* checkpoint, std::int64_t* count) {
    return guarded([&] {
        given(count, "count") =
            static_cast<std::int64_t>(given(checkpoint, "checkpoint").opened.banks().size());
    });
}

globe_status globe_bank_at(const globe_checkpoint* checkpoint, std::int64_t bank, globe_bank* out) {
    return guarded([&] {
        const auto& banks = given(checkpoint, "checkpoint").opened.banks();
        if (bank < 0 || bank >= static_cast<std::int64_t>(banks.size())) {
            throw std::invalid_argument("bank: found " + std::to_string(bank) + "; expected 0 to " +
                                        std::to_string(banks.size() - 1));
        }
        const globe::Bank& found = banks[static_cast<std::size_t>(bank)];
        given(out, "out") = {found.name.c_str(),     found.rank,          found.width,
                             matrix_of(found.atoms), found.codes.rows,    found.codes.nnz,
                             found.codes.indptr,     found.codes.indices, found.codes.values};
    });
}

globe_status globe_expert_matrix_at(const globe_checkpoint* checkpoint, std::int32_t family,
                                    std::int64_t layer, std::int64_t expert, globe_expert_matrix* out) {
    return guarded([&] {
        const auto& opened = given(checkpoint, "checkpoint").opened;
        const auto& found = opened.matrix(static_cast<globe::Family>(family), layer, expert);
        given(out, "out") = {matrix_of(found.stored), found.bank, found.row};
    });
}

globe_status globe_compose(const globe_checkpoint* checkpoint, const globe_expert_matrix* matrix,
                           const globe_matrix* out, std::int32_t threads) {
    return guarded([&] {
        const auto& from = given(checkpoint, "checkpoint");
        const auto wanted = checked(from, given(matrix, "matrix"));
        const auto& target = given(out, "out");
        given(static_cast<unsigned char*>(target.data), "out");
        from.opened.compose(wanted, view_of(target, "out"), threads);
    });
}

globe_status globe_expert_workspace(const globe_checkpoint* checkpoint, std::int64_t tokens,
                                    std::int32_t threads, std::size_t* bytes) {
    return guarded([&] {
        given(bytes, "bytes") =
            globe::expert_workspace(given(checkpoint, "checkpoint").opened, tokens, threads);
    });
}

globe_status globe_expert_forward(const globe_checkpoint* checkpoint, std::int64_t layer, std::int64_t expert,
                                  const globe_const_matrix* tokens, const globe_matrix* out,
                                  const globe_expert_options* options) {
    return guarded([&] {
        const auto& chosen = given(options, "options");
        globe::ExpertCache* cache = chosen.cache == nullptr ? nullptr : &chosen.cache->held;
        globe::expert_forward(given(checkpoint, "checkpoint").opened, {layer, expert},
                              view_of(given(tokens, "tokens"), "tokens"), view_of(given(out, "out"), "out"),
                              {chosen.workspace, chosen.workspace_bytes},
                              {static_cast<globe::Activation>(chosen.activation), cache, chosen.threads});
    });
}

globe_status globe_cache_new(std::size_t budget, std::int32_t dtype, globe_cache** out) {
    return guarded(
        [&] { given(out, "out") = new globe_cache{globe::ExpertCache(budget, dtype_of(dtype, "dtype"))}; });
}

void globe_cache_free(globe_cache* cache) {
    delete cache;
}

globe_status globe_cache_touch(globe_cache* cache, const globe_checkpoint* checkpoint,
                               const globe_expert_matrix* matrix) {
    return guarded([&] {
        const auto& from = given(checkpoint, "checkpoint");
        given(cache, "cache").held.get(from.opened, checked(from, given(matrix, "matrix")), 1);
    });
}

globe_status globe_cache_resize(globe_cache* cache, std::size_t budget) {
    return guarded([&] { given(cache, "cache").held.resize(budget); });
}

globe_status globe_cache_clear(globe_cache* cache) {
    return guarded([&] { given(cache, "cache").held.clear(); });
}

globe_status globe_cache_stats_of(const globe_cache* cache, globe_cache_stats* out) {
    return guarded([&] {
        const auto stats = given(cache, "cache").held.stats();
        given(out, "out") = {stats.hits,    stats.misses, stats.evictions,
                             stats.entries, stats.bytes,  stats.budget};
    });
}

globe_status globe_cache_keys(const globe_cache* cache, globe_cache_key* keys, std::int64_t capacity,
                              std::int64_t* count) {
    return guarded([&] {
        const auto found = given(cache, "cache").held.keys();
        const auto held = static_cast<std::int64_t>(found.size());
        for (std::int64_t i = 0; i < held && i < capacity; ++i) {
            const auto& key = found[static_cast<std::size_t>(i)];
            (&given(keys, "keys"))[i] = {key.checkpoint, key.bank, key.row};
        }
        given(count, "count") = held;
    });
}
