/* run_expert_c OUT TOKENS RESULT: run_expert.cpp in C. */
#include <globe/globe.h>
#include <stdio.h>
#include <stdlib.h>

static int refuse(const char* what) {
    fprintf(stderr, "run_expert_c: error: %s\n", what);
    return 1;
}

static float* read_numbers(const char* path, size_t* count) {
    FILE* file = fopen(path, "rb");
    float* numbers = NULL;
    if (file == NULL) return NULL;
    if (fseek(file, 0, SEEK_END) == 0) *count = (size_t)ftell(file) / sizeof(float);
    rewind(file);
    numbers = malloc(*count * sizeof(float) + 1);
    if (numbers != NULL && fread(numbers, sizeof(float), *count, file) != *count) {
        free(numbers);
        numbers = NULL;
    }
    fclose(file);
    return numbers;
}

static globe_status run_layer(const globe_checkpoint* checkpoint, int64_t layer,
                              const globe_const_matrix* tokens, const globe_matrix* made,
                              const globe_expert_options* options, FILE* result) {
    int64_t experts = 0;
    globe_status status = globe_experts(checkpoint, layer, &experts);
    for (int64_t expert = 0; status == GLOBE_OK && expert < experts; ++expert) {
        status = globe_expert_forward(checkpoint, layer, expert, tokens, made, options);
        fwrite(made->data, sizeof(float), (size_t)(made->rows * made->cols), result);
    }
    return status;
}

static globe_status run(const globe_checkpoint* checkpoint, float* numbers, size_t count, FILE* result) {
    const int64_t* layers = NULL;
    int64_t layer_count = 0, width = 0;
    globe_expert_options options = {0};
    globe_status status = globe_layers(checkpoint, &layers, &layer_count);
    if (status == GLOBE_OK) status = globe_hidden_size(checkpoint, &width);
    if (status != GLOBE_OK) return status;
    const globe_const_matrix tokens = {numbers, (int64_t)count / width, width, 0, GLOBE_FLOAT32};
    const globe_matrix made = {malloc(count * sizeof(float) + 1), tokens.rows, width, 0, GLOBE_FLOAT32};
    status = globe_expert_workspace(checkpoint, tokens.rows, 0, &options.workspace_bytes);
    options.workspace = malloc(options.workspace_bytes);
    for (int64_t i = 0; status == GLOBE_OK && i < layer_count; ++i) {
        status = run_layer(checkpoint, layers[i], &tokens, &made, &options, result);
    }
    free(options.workspace);
    free(made.data);
    return status;
}

int main(int argc, char** argv) {
    globe_checkpoint* checkpoint = NULL;
    size_t count = 0;
    if (argc != 4) {
        fprintf(stderr, "usage: run_expert_c OUT TOKENS RESULT\n");
        return 2;
    }
    if (globe_open(argv[1], &checkpoint) != GLOBE_OK) return refuse(globe_last_error());
    float* tokens = read_numbers(argv[2], &count);
    FILE* result = fopen(argv[3], "wb");
    if (tokens == NULL || result == NULL) return refuse("TOKENS or RESULT cannot be opened");
    const globe_status status = run(checkpoint, tokens, count, result);
    if (fclose(result) != 0) return refuse("RESULT cannot be written");
    free(tokens);
    globe_close(checkpoint);
    return status == GLOBE_OK ? 0 : refuse(globe_last_error());
}
