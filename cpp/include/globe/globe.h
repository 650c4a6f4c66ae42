/* GloBE from C, or from any language that calls C: a factored checkpoint, from file to the output of an
 * expert.
 *
 * Every function that can fail returns a status; globe_last_error() then tells one line about the last
 * failure on the calling thread. Nothing is thrown. Results are written only where GLOBE_OK is returned;
 * pointers in them live as long as the handle that they were asked of. Any number of threads may use a handle
 * at the same time, but for closing it. What is not said here is said in globe/factored.hpp and
 * globe/expert.hpp. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "globe/export.h"

#define GLOBE_VERSION_MAJOR 0
#define GLOBE_VERSION_MINOR 1
#define GLOBE_VERSION_PATCH 0
#define GLOBE_VERSION "0.1.0"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum globe_status {
    GLOBE_OK = 0,
    GLOBE_INVALID_ARGUMENT = 1, /* the message begins with the argument's name */
    GLOBE_BAD_CHECKPOINT = 2,   /* a file is missing, damaged, or of a format that is not read */
    GLOBE_OUT_OF_MEMORY = 3,
    GLOBE_INTERNAL = 4
} globe_status;

typedef enum globe_dtype { GLOBE_FLOAT32 = 0, GLOBE_FLOAT16 = 1, GLOBE_BFLOAT16 = 2 } globe_dtype;
typedef enum globe_family { GLOBE_GATE = 0, GLOBE_UP = 1, GLOBE_DOWN = 2 } globe_family;
typedef enum globe_activation {
    GLOBE_SILU = 0,
    GLOBE_GELU = 1,
    GLOBE_GELU_TANH = 2,
    GLOBE_RELU = 3
} globe_activation;

/* rows x cols numbers, row after row; stride numbers from one row to the next, 0: cols. dtype is a
 * globe_dtype. */
typedef struct globe_const_matrix {
    const void* data;
    int64_t rows, cols, stride;
    int32_t dtype;
} globe_const_matrix;
typedef struct globe_matrix {
    void* data;
    int64_t rows, cols, stride;
    int32_t dtype;
} globe_matrix;

typedef struct globe_bank {
    const char* name;
    int64_t rank, width;       /* an atom is rank x width */
    globe_const_matrix atoms;  /* size x (rank * width) */
    int64_t experts, nonzeros; /* codes: experts x size in compressed rows */
    const int64_t* indptr;
    const int32_t* indices;
    const float* values;
} globe_bank;

/* stored: the matrix itself where bank is -1; otherwise the left factor, and row is that of the bank's codes.
 */
typedef struct globe_expert_matrix {
    globe_const_matrix stored;
    int64_t bank, row;
} globe_expert_matrix;

typedef struct globe_cache_stats {
    int64_t hits, misses, evictions, entries;
    size_t bytes, budget;
} globe_cache_stats;

typedef struct globe_cache_key {
    uint64_t checkpoint;
    int64_t bank, row;
} globe_cache_key;

typedef struct globe_checkpoint globe_checkpoint;
typedef struct globe_cache globe_cache;

/* What expert_forward is to do. A struct of zeros but for `workspace` and its bytes is the default. */
typedef struct globe_expert_options {
    int32_t activation; /* a globe_activation */
    int32_t threads;    /* 0 = one per hardware thread */
    void* workspace;
    size_t workspace_bytes;
    globe_cache* cache; /* or null */
} globe_expert_options;

GLOBE_API const char* globe_version(void);    /* of the library that runs: GLOBE_VERSION when it was built */
GLOBE_API const char* globe_last_error(void); /* never null; empty before the first failure of the thread */
GLOBE_API const char* globe_active_isa(
    void); /* the instruction set in use; null where GLOBE_ISA names none */

GLOBE_API globe_status globe_open(const char* directory, globe_checkpoint** out);
GLOBE_API void globe_close(globe_checkpoint* checkpoint); /* null is fine */

/* The numbers of the layers that have routed experts, ascending. */
GLOBE_API globe_status globe_layers(const globe_checkpoint* checkpoint, const int64_t** layers,
                                    int64_t* count);
/* The width of the model: what a token has. */
GLOBE_API globe_status globe_hidden_size(const globe_checkpoint* checkpoint, int64_t* size);
/* How many routed experts a layer has; 0 for other layers. */
GLOBE_API globe_status globe_experts(const globe_checkpoint* checkpoint, int64_t layer, int64_t* count);
GLOBE_API globe_status globe_bank_count(const globe_checkpoint* checkpoint, int64_t* count);
GLOBE_API globe_status globe_bank_at(const globe_checkpoint* checkpoint, int64_t bank, globe_bank* out);
/* family is a globe_family. */
GLOBE_API globe_status globe_expert_matrix_at(const globe_checkpoint* checkpoint, int32_t family,
                                              int64_t layer, int64_t expert, globe_expert_matrix* out);

/* The mixture of a factored matrix: rank x width of its bank. */
GLOBE_API globe_status globe_compose(const globe_checkpoint* checkpoint, const globe_expert_matrix* matrix,
                                     const globe_matrix* out, int32_t threads);

GLOBE_API globe_status globe_expert_workspace(const globe_checkpoint* checkpoint, int64_t tokens,
                                              int32_t threads, size_t* bytes);
/* out[t, :] = down(act(gate x_t) * (up x_t)) for tokens x_t that go to one expert. */
GLOBE_API globe_status globe_expert_forward(const globe_checkpoint* checkpoint, int64_t layer, int64_t expert,
                                            const globe_const_matrix* tokens, const globe_matrix* out,
                                            const globe_expert_options* options);

/* Mixtures within a budget of bytes, SIZE_MAX for no bound, kept as a globe_dtype; the least recently used
 * make room. */
GLOBE_API globe_status globe_cache_new(size_t budget, int32_t dtype, globe_cache** out);
GLOBE_API void globe_cache_free(globe_cache* cache); /* null is fine */
/* Puts a mixture there, as a call that needs it would. */
GLOBE_API globe_status globe_cache_touch(globe_cache* cache, const globe_checkpoint* checkpoint,
                                         const globe_expert_matrix* matrix);
GLOBE_API globe_status globe_cache_resize(globe_cache* cache, size_t budget);
GLOBE_API globe_status globe_cache_clear(globe_cache* cache);
GLOBE_API globe_status globe_cache_stats_of(const globe_cache* cache, globe_cache_stats* out);
/* What is held, the least recently used first: up to `capacity` keys are written, `count` is how many there
 * are. */
GLOBE_API globe_status globe_cache_keys(const globe_cache* cache, globe_cache_key* keys, int64_t capacity,
                                        int64_t* count);

#ifdef __cplusplus
}
#endif
