/* linear.c: splitting linears into row tiles over threads, and tokens into depths. */
#include "linear.h"

#include "definition.h"
#include "f16.h"

#include <math.h>

/* Of one token, chunks of rows per thread: enough that a thread that is held up leaves little for the others to wait on. */
enum { CHUNKS_PER_THREAD = 4 };

/* Of more tokens, tiles and tokens multiplied with each other: the planes of these tiles and the activations of these tokens
 * stay in the second-level cache together. */
enum { TILES_AT_ONCE = 8, TOKENS_AT_ONCE = 128 };

typedef struct linear_context {
    const mq_kernels *kernels;
    const mq_activations *x;
    const mq_linear_job *jobs;
    size_t count, chunk; /* chunk: tiles per item */
} linear_context;

static size_t chunks_of(const mq_linear_job *job, size_t chunk)
{
    return (job->matrix->tiles + chunk - 1) / chunk;
}

static void run_item(void *argument, size_t item, uint32_t thread)
{
    (void)thread;
    const linear_context *context = argument;
    const mq_linear_job *job = context->jobs;
    while (item >= chunks_of(job, context->chunk)) {
        item -= chunks_of(job, context->chunk);
        job++;
    }
    const size_t begin = item * context->chunk, tiles = job->matrix->tiles;
    const size_t end = begin + context->chunk < tiles ? begin + context->chunk : tiles;
    const mq_activations *x = context->x;
    for (uint32_t depth = 1; depth <= MQ_SLICE_COUNT; depth++) {
        const uint32_t *tokens = job->order + job->first[depth];
        const uint32_t n = job->first[depth + 1] - job->first[depth];
        if (n == 1) {
            const size_t t = tokens[0];
            context->kernels->matvec(job->matrix, depth, x->q + t * x->groups * MQ_GROUP_SIZE, x->scale + t * x->groups,
                                     x->sum + t * x->groups, begin, end, job->y + t * job->y_stride);
        }
        for (uint32_t first = 0; n > 1 && first < n; first += TOKENS_AT_ONCE) {
            const uint32_t count = n - first < TOKENS_AT_ONCE ? n - first : TOKENS_AT_ONCE;
            context->kernels->matmat(job->matrix, depth, x, tokens + first, count, begin, end, job->y, job->y_stride);
        }
    }
}

void mq_linear_sort(mq_linear_job *job, const uint8_t *depths, size_t depth_stride, uint32_t n, uint32_t *order)
{
    uint32_t at = 0;
    job->order = order;
    job->first[0] = 0;
    for (uint32_t depth = 1; depth <= MQ_SLICE_COUNT; depth++) {
        job->first[depth] = at;
        for (uint32_t t = 0; t < n; t++) {
            if (depths[t * depth_stride] == depth) {
                order[at++] = t;
            }
        }
    }
    job->first[MQ_SLICE_COUNT + 1] = at;
}

void mq_linear_run(const mq_kernels *kernels, mq_pool *pool, const mq_activations *x, const mq_linear_job *jobs, size_t count)
{
    size_t tiles = 0, items = 0;
    for (size_t i = 0; i < count; i++) {
        tiles += jobs[i].matrix->tiles;
    }
    const uint32_t threads = mq_pool_threads(pool), tokens = jobs[0].first[MQ_SLICE_COUNT + 1];
    const size_t wanted = threads == 1 ? 1 : (size_t)threads * CHUNKS_PER_THREAD;
    const size_t chunk = tokens == 1 ? (tiles + wanted - 1) / wanted : TILES_AT_ONCE;
    linear_context context = {kernels, x, jobs, count, chunk};
    for (size_t i = 0; i < count; i++) {
        items += chunks_of(&jobs[i], context.chunk);
    }
    mq_pool_run(pool, run_item, &context, items);
}

void mq_embedding_row(const mq_matrix *matrix, uint32_t depth, uint32_t row, float *x)
{
    enum { STEP = 4 };
    const size_t tile = row / MQ_TILE_ROWS, r = row % MQ_TILE_ROWS;
    for (size_t c = 0; c < matrix->columns; c++) {
        const size_t at = tile * matrix->groups + c / MQ_GROUP_SIZE, within = c % MQ_GROUP_SIZE;
        const size_t byte = at * MQ_TILE_BYTES + within / MQ_TILE_ROWS * (MQ_TILE_ROWS * STEP) + r * STEP + within % STEP;
        const uint32_t shift = (uint32_t)(within / STEP % STEP) * MQ_SLICE_BITS;
        uint32_t code = 0;
        for (uint32_t e = 0; e < depth; e++) {
            code = code << MQ_SLICE_BITS | ((uint32_t)(matrix->plane[e][byte] >> shift) & 3u);
        }
        const uint16_t *pair = matrix->scale_offset + at * 2 * MQ_TILE_ROWS;
        const float step = mq_f16_to_f32(pair[r]) * mq_depth_factor(depth);
        x[c] = fmaf(step, (float)code + 0.5f, -mq_f16_to_f32(pair[MQ_TILE_ROWS + r]));
    }
}
