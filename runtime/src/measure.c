/* measure.c: timed loops over memory. Data is random, so that nothing depends on its values; the clock is monotonic. */
#include "measure.h"

#include "error.h"
#include "linear.h"
#include "memory.h"
#include "model.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PASS_BYTES = 400000000, CHUNK = 1 << 20, WORDS_AT_ONCE = 32, LINE_WORDS = 8, AHEAD = 8192 };

static double now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void fill(void *memory, size_t bytes)
{
    uint64_t state = 88172645463325252u, *words = memory; /* xorshift64 */
    for (size_t i = 0; i < bytes / sizeof *words; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words[i] = state;
    }
}

typedef struct read_context {
    const uint64_t *words;
    size_t count;
    uint64_t sums[256]; /* one per thread, so that no read can be dropped */
} read_context;

static void read_chunk(void *argument, size_t item, uint32_t thread)
{
    read_context *context = argument;
    const size_t begin = item * (CHUNK / sizeof(uint64_t));
    const size_t end = begin + CHUNK / sizeof(uint64_t) < context->count ? begin + CHUNK / sizeof(uint64_t) : context->count;
    uint64_t sums[WORDS_AT_ONCE] = {0};
    for (size_t i = begin; i + WORDS_AT_ONCE <= end; i += WORDS_AT_ONCE) {
        for (size_t j = 0; j < WORDS_AT_ONCE; j += LINE_WORDS) {
            __builtin_prefetch(context->words + i + j + AHEAD / sizeof(uint64_t));
        }
        for (size_t j = 0; j < WORDS_AT_ONCE; j++) {
            sums[j] ^= context->words[i + j];
        }
    }
    for (size_t j = 0; j < WORDS_AT_ONCE; j++) {
        context->sums[thread % 256] ^= sums[j];
    }
}

mq_status mq_measure_read(uint32_t n_threads, size_t bytes, uint32_t repeats, double *seconds, mq_error *error)
{
    mq_pool *pool = NULL;
    mq_status status = mq_pool_open(n_threads, &pool, error);
    uint64_t *words = status == MQ_OK ? mq_alloc(bytes, 1) : NULL;
    if (status == MQ_OK && words == NULL) {
        status = mq_fail(error, MQ_ERR_MEMORY, "cannot allocate %zu bytes to measure the read bandwidth", bytes);
    }
    if (status == MQ_OK) {
        fill(words, bytes);
        read_context context = {.words = words, .count = bytes / sizeof *words};
        for (uint32_t i = 0; i < repeats; i++) {
            const double start = now();
            mq_pool_run(pool, read_chunk, &context, (bytes + CHUNK - 1) / CHUNK);
            seconds[i] = now() - start;
        }
    }
    free(words);
    mq_pool_close(pool);
    return status;
}

/* One matrix per copy over shared random memory; scales and offsets are finite, so that no value is special. */
static mq_status make_copies(uint32_t rows, uint32_t columns, uint32_t depth, size_t copies, mq_matrix *matrices,
                             uint8_t **memory, mq_error *error)
{
    mq_matrix shape = {.rows = rows, .columns = columns};
    shape.tiles = (rows + MQ_TILE_ROWS - 1) / MQ_TILE_ROWS;
    shape.groups = (columns + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE;
    const size_t plane = (size_t)shape.tiles * shape.groups * MQ_TILE_BYTES, scales = mq_matrix_bytes(&shape, 0);
    const size_t each = plane * depth + scales;
    size_t total = 0;
    *memory = mq_mul(each, copies, &total) ? mq_alloc(total, 1) : NULL;
    if (*memory == NULL) {
        return mq_fail(error, MQ_ERR_MEMORY, "cannot allocate %zu copies of a %u x %u linear", copies, rows, columns);
    }
    fill(*memory, total);
    /* All slices 1 lie together, then all slices 2, as in a file. */
    for (size_t i = 0; i < copies; i++) {
        matrices[i] = shape;
        for (uint32_t e = 0; e < depth; e++) {
            matrices[i].plane[e] = *memory + (e * copies + i) * plane;
        }
        uint16_t *scale_offset = (uint16_t *)(void *)(*memory + depth * copies * plane + i * scales);
        for (size_t j = 0; j < scales / sizeof *scale_offset; j++) {
            scale_offset[j] = 0x2400; /* 2^-6 in f16 */
        }
        matrices[i].scale_offset = scale_offset;
    }
    return MQ_OK;
}

static void time_passes(const mq_kernels *kernels, mq_pool *pool, const mq_matrix *matrices, size_t copies, uint32_t depth,
                        const mq_activations *x, float *y, uint32_t repeats, double *seconds)
{
    const uint8_t depths[1] = {(uint8_t)depth};
    uint32_t order[1];
    mq_linear_job job = {.y = y, .y_stride = matrices[0].rows};
    mq_linear_sort(&job, depths, 1, 1, order);
    for (uint32_t i = 0; i < repeats; i++) {
        const double start = now();
        for (size_t j = 0; j < copies; j++) {
            job.matrix = &matrices[j];
            mq_linear_run(kernels, pool, x, &job, 1);
        }
        seconds[i] = (now() - start) / (double)copies;
    }
}

mq_status mq_measure_matvec(const char *kernel, uint32_t rows, uint32_t columns, uint32_t depth, uint32_t n_threads,
                            uint32_t repeats, double *seconds, size_t *bytes, mq_error *error)
{
    const mq_kernels *kernels = mq_kernels_find(kernel);
    if (kernels == NULL) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "kernel: '%s' is unknown or not supported by this CPU", kernel);
    }
    if (rows < 1 || columns < 1 || depth < 1 || depth > MQ_SLICE_COUNT) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "shape %u x %u, depth %u: expected positive sizes and a depth of 1 to %d", rows,
                       columns, depth, MQ_SLICE_COUNT);
    }
    const mq_matrix shape = {.tiles = (rows + MQ_TILE_ROWS - 1) / MQ_TILE_ROWS,
                             .groups = (columns + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE};
    *bytes = mq_matrix_bytes(&shape, depth);
    const size_t copies = PASS_BYTES / *bytes + 1;
    mq_pool *pool = NULL;
    uint8_t *memory = NULL;
    mq_matrix *matrices = mq_alloc(copies, sizeof *matrices);
    float *x = mq_alloc(columns, sizeof *x), *y = mq_alloc(rows, sizeof *y);
    mq_activations activations = {.q = mq_alloc(shape.groups, MQ_GROUP_SIZE), .scale = mq_alloc(shape.groups, sizeof(float)),
                                  .sum = mq_alloc(shape.groups, sizeof(float)), .groups = shape.groups};
    mq_status status = mq_pool_open(n_threads, &pool, error);
    if (status == MQ_OK && (matrices == NULL || x == NULL || y == NULL || activations.q == NULL || activations.scale == NULL
                            || activations.sum == NULL)) {
        status = mq_fail(error, MQ_ERR_MEMORY, "cannot allocate the operands of a %u x %u linear", rows, columns);
    }
    if (status == MQ_OK) {
        status = make_copies(rows, columns, depth, copies, matrices, &memory, error);
    }
    if (status == MQ_OK) {
        for (uint32_t i = 0; i < columns; i++) {
            x[i] = (float)(i * 37 % 255) - 127.0f;
        }
        (void)kernels->quantize(x, columns, activations.q, activations.scale, activations.sum);
        time_passes(kernels, pool, matrices, copies, depth, &activations, y, repeats, seconds);
    }
    mq_pool_close(pool);
    free(memory);
    free(matrices);
    free(x);
    free(y);
    free(activations.q);
    free(activations.scale);
    free(activations.sum);
    return status;
}
