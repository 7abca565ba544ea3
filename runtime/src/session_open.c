/* session_open.c: opening and closing sessions: the options checked, everything allocated that evaluation will use. */
#include "session.h"

#include "attention.h"
#include "definition.h"
#include "device.h"
#include "error.h"
#include "memory.h"
#include "rope.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_BATCH = 512, MAX_ALLOCATIONS = 40 };

/* One zeroed array that the session owns; NULL is remembered by the caller's check of *failed. */
static void *own(mq_session *session, size_t count, size_t size, int32_t *failed)
{
    void *memory = session->n_allocations < MAX_ALLOCATIONS ? mq_alloc(count, size) : NULL;
    if (memory == NULL) {
        *failed = 1;
        return NULL;
    }
    session->allocations[session->n_allocations++] = memory;
    return memory;
}

/* a·b·c, or SIZE_MAX, which no allocation satisfies. */
static size_t product(size_t a, size_t b, size_t c)
{
    size_t total = 0;
    return mq_mul(a, b, &total) && mq_mul(total, c, &total) ? total : SIZE_MAX;
}

static int32_t allocate_batch(mq_session *session)
{
    const mq_hparams *hp = &session->model->hparams;
    mq_batch *batch = &session->batch;
    const size_t n = session->n_batch, width = hp->embedding_length, ff = hp->feed_forward_length;
    const size_t q_width = (size_t)hp->head_count * hp->head_dim, kv_width = (size_t)hp->head_count_kv * hp->head_dim;
    size_t widest = width > ff ? width : ff;
    widest = q_width > widest ? q_width : widest;
    const size_t groups = (widest + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE;
    int32_t failed = 0;
    batch->x = own(session, product(n, width, 1), sizeof(float), &failed);
    batch->normed = own(session, product(n, width, 1), sizeof(float), &failed);
    batch->branch = own(session, product(n, width, 1), sizeof(float), &failed);
    batch->q = own(session, product(n, q_width, 1), sizeof(float), &failed);
    batch->attended = own(session, product(n, q_width, 1), sizeof(float), &failed);
    batch->k = own(session, product(n, kv_width, 1), sizeof(float), &failed);
    batch->v = own(session, product(n, kv_width, 1), sizeof(float), &failed);
    batch->gate = own(session, product(n, ff, 1), sizeof(float), &failed);
    batch->up = own(session, product(n, ff, 1), sizeof(float), &failed);
    batch->activations.q = own(session, product(n, groups, MQ_GROUP_SIZE), sizeof(int8_t), &failed);
    batch->activations.scale = own(session, product(n, groups, 1), sizeof(float), &failed);
    batch->activations.sum = own(session, product(n, groups, 1), sizeof(float), &failed);
    for (size_t i = 0; i < MQ_MAX_JOBS; i++) {
        batch->order[i] = own(session, n, sizeof(uint32_t), &failed);
    }
    return failed;
}

/* Keys or values of every block, `width` numbers a slot; each block gets its part. */
static int32_t allocate_side(mq_session *session, mq_cache_type type, size_t slots, size_t width, size_t offset)
{
    const mq_hparams *hp = &session->model->hparams;
    const size_t bytes = mq_cache_number_bytes(type), groups = type == MQ_CACHE_Q8_0 ? mq_cache_groups(hp->head_dim) : 0;
    int32_t failed = 0;
    uint8_t *numbers = own(session, product(slots, hp->head_count_kv, width), bytes, &failed);
    uint16_t *scales = groups > 0 ? own(session, product(slots, hp->head_count_kv, groups), sizeof *scales, &failed) : NULL;
    for (uint32_t i = 0; i < hp->block_count && !failed; i++) {
        const size_t rows = session->caches[i].slots * hp->head_count_kv;
        const mq_side side = {numbers, scales};
        memcpy((char *)&session->caches[i] + offset, &side, sizeof side);
        numbers += rows * width * bytes;
        scales = groups > 0 ? scales + rows * groups : NULL;
        session->cache_bytes += rows * (width * bytes + groups * sizeof *scales);
    }
    return failed;
}

static int32_t allocate_caches(mq_session *session)
{
    const mq_model *model = session->model;
    const mq_hparams *hp = &model->hparams;
    const size_t dim = hp->head_dim;
    int32_t failed = 0;
    size_t slots = 0; /* of all blocks: at most 1024 blocks of 2^32 positions */
    session->caches = own(session, hp->block_count, sizeof *session->caches, &failed);
    for (uint32_t i = 0; i < hp->block_count && !failed; i++) {
        session->caches[i].slots = mq_cache_slots(model->blocks[i].window, session->n_ctx, session->n_batch);
        session->caches[i].head_dim = dim;
        slots += session->caches[i].slots;
    }
    if (model->device != NULL) { /* keys and values are there */
        return failed;
    }
    failed = failed || allocate_side(session, session->key_type, slots, dim, offsetof(mq_cache, keys));
    return failed || allocate_side(session, session->value_type, slots, mq_padded_dim(dim), offsetof(mq_cache, values));
}

/* What a GPU has its own of: cache, batch and scratch. */
static int32_t allocate_cpu(mq_session *session, uint32_t n_threads)
{
    const mq_hparams *hp = &session->model->hparams;
    const size_t ctx = session->n_ctx;
    int32_t failed = allocate_batch(session);
    session->scratch = own(session, n_threads, sizeof(mq_scratch), &failed);
    const size_t part = mq_part_floats(hp->head_dim), shared = hp->head_count / hp->head_count_kv;
    const size_t floats = product(MQ_ATTENTION_TOKENS, shared, part); /* whole cache lines, so that no line is shared */
    float *scratch = own(session, product(2, n_threads, floats), sizeof(float), &failed);
    for (size_t i = 0; i < n_threads && !failed; i++) {
        session->scratch[i].parts = scratch + 2 * i * floats;
        session->scratch[i].next = scratch + (2 * i + 1) * floats;
    }
    const size_t chunks = (ctx + MQ_ATTENTION_CHUNK - 1) / MQ_ATTENTION_CHUNK;
    session->parts = own(session, product(hp->head_count, chunks, part), sizeof(float), &failed);
    return failed;
}

static int32_t allocate(mq_session *session, uint32_t n_threads)
{
    const mq_hparams *hp = &session->model->hparams;
    const size_t ctx = session->n_ctx, half = hp->rope_dim / 2;
    int32_t failed = allocate_caches(session);
    for (size_t i = 0; i < MQ_ROPES; i++) {
        if (session->model->inv_freq[i] != NULL) {
            session->cosine[i] = own(session, product(ctx, half, 1), sizeof(float), &failed);
            session->sine[i] = own(session, product(ctx, half, 1), sizeof(float), &failed);
        }
    }
    session->depths = own(session, product(ctx, hp->block_count, MQ_LINEARS), sizeof(uint8_t), &failed);
    session->table = own(session, product(hp->block_count, MQ_LINEARS, 1), sizeof(uint8_t), &failed);
    session->thresholds = own(session, product(hp->block_count, MQ_LINEARS, MQ_GATES), sizeof(float), &failed);
    session->asked_at = own(session, ctx, sizeof(float), &failed);
    if (session->model->device == NULL) {
        failed |= allocate_cpu(session, n_threads);
    }
    return failed;
}

static mq_status check_options(const mq_model *model, const mq_session_options *options, mq_session *session, mq_error *error)
{
    const uint32_t limit = model->hparams.context_length;
    session->n_ctx = options->n_ctx == 0 ? limit : options->n_ctx;
    if (session->n_ctx > limit) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "n_ctx: expected at most %" PRIu32 ", the context the model was trained for, found "
                       "%" PRIu32, limit, session->n_ctx);
    }
    session->n_batch = options->n_batch == 0 ? DEFAULT_BATCH : options->n_batch;
    session->n_batch = session->n_batch < session->n_ctx ? session->n_batch : session->n_ctx;
    if (model->device != NULL && session->n_batch > MQ_DEVICE_BATCH) {
        session->n_batch = MQ_DEVICE_BATCH;
    }
    session->key_type = options->cache_type_k;
    session->value_type = options->cache_type_v;
    if (session->key_type > MQ_CACHE_Q8_0 || session->value_type > MQ_CACHE_Q8_0) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "cache type: expected %d (f16) or %d (q8_0), found %d for keys and %d for values",
                       MQ_CACHE_F16, MQ_CACHE_Q8_0, (int)session->key_type, (int)session->value_type);
    }
    session->kernels = mq_kernels_find(options->kernel);
    if (session->kernels == NULL) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "kernel: '%s' is unknown or not supported by this CPU", options->kernel);
    }
    return MQ_OK;
}

mq_status mq_session_open(const mq_model *model, const mq_session_options *options, mq_session **out, mq_error *error)
{
    if (model == NULL || out == NULL) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "session: expected a model and a place for the handle, found NULL");
    }
    const mq_session_options plain = {0};
    options = options == NULL ? &plain : options;
    *out = NULL;
    mq_session *session = mq_alloc(1, sizeof *session);
    if (session != NULL) {
        session->allocations = mq_alloc(MAX_ALLOCATIONS, sizeof *session->allocations);
    }
    if (session == NULL || session->allocations == NULL) {
        mq_session_close(session);
        return mq_fail(error, MQ_ERR_MEMORY, "cannot allocate a session");
    }
    session->model = model;
    session->output_depth = model->hparams.output_depth;
    atomic_flag_clear(&session->busy);
    const uint32_t n_threads = options->n_threads == 0 ? 1 : options->n_threads;
    mq_status status = check_options(model, options, session, error);
    if (status == MQ_OK) {
        status = mq_pool_open(n_threads, &session->pool, error);
    }
    if (status == MQ_OK && allocate(session, n_threads)) {
        status = mq_fail(error, MQ_ERR_MEMORY, "cannot allocate a session of %" PRIu32 " positions and batches of %" PRIu32
                         " tokens", session->n_ctx, session->n_batch);
    }
    if (status != MQ_OK) {
        mq_session_close(session);
        return status;
    }
    for (size_t i = 0; i < MQ_ROPES; i++) {
        if (model->inv_freq[i] != NULL) {
            mq_rope_fill(model, i, session->n_ctx, session->cosine[i], session->sine[i]);
        }
    }
    memset(session->table, (int)model->info.max_depth, (size_t)model->hparams.block_count * MQ_LINEARS);
    session->budget_changed = true;
    if (model->device != NULL) {
        status = mq_device_session_open(session, error);
        if (status != MQ_OK) {
            mq_session_close(session);
            return status;
        }
    }
    *out = session;
    return MQ_OK;
}

void mq_session_close(mq_session *session)
{
    if (session == NULL) {
        return;
    }
    mq_device_session_close(session);
    mq_pool_close(session->pool);
    for (size_t i = 0; i < session->n_allocations; i++) {
        free(session->allocations[i]);
    }
    free(session->allocations);
    free(session);
}
