/* session.c: opening and closing sessions, and the checks before a forward pass. */
#include "session.h"

#include "attention.h"
#include "budget.h"
#include "definition.h"
#include "device.h"
#include "error.h"
#include "memory.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef MQ_VERSION
#define MQ_VERSION "unversioned"
#endif

enum { DEFAULT_BATCH = 512, MAX_ALLOCATIONS = 40 };

const char *mq_version(void)
{
    return MQ_VERSION;
}

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
    const size_t ctx = session->n_ctx, half = hp->head_dim / 2;
    int32_t failed = allocate_caches(session);
    session->cosine = own(session, product(ctx, half, 1), sizeof(float), &failed);
    session->sine = own(session, product(ctx, half, 1), sizeof(float), &failed);
    session->depths = own(session, product(ctx, hp->block_count, MQ_LINEARS), sizeof(uint8_t), &failed);
    session->table = own(session, product(hp->block_count, MQ_LINEARS, 1), sizeof(uint8_t), &failed);
    session->thresholds = own(session, product(hp->block_count, MQ_LINEARS, MQ_GATES), sizeof(float), &failed);
    session->asked_at = own(session, ctx, sizeof(float), &failed);
    if (session->model->device == NULL) {
        failed |= allocate_cpu(session, n_threads);
    }
    return failed;
}

/* Angles in float32 like the reference's, the cosine itself in double. */
static void fill_rope(mq_session *session)
{
    const size_t half = session->model->hparams.head_dim / 2;
    for (size_t p = 0; p < session->n_ctx; p++) {
        for (size_t i = 0; i < half; i++) {
            const float angle = (float)p * session->model->inv_freq[i];
            session->cosine[p * half + i] = (float)cos((double)angle);
            session->sine[p * half + i] = (float)sin((double)angle);
        }
    }
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
    session->attention_scale = 1.0f / sqrtf((float)model->hparams.head_dim);
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
    fill_rope(session);
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

const char *mq_session_kernel(const mq_session *session)
{
    return session->device != NULL ? "cuda" : session->kernels->name;
}

mq_status mq_session_acquire(mq_session *session, mq_error *error)
{
    if (atomic_flag_test_and_set_explicit(&session->busy, memory_order_acquire)) {
        return mq_fail(error, MQ_ERR_BUSY, "the session is in use by another thread; open one session per thread");
    }
    return MQ_OK;
}

void mq_session_release(mq_session *session)
{
    atomic_flag_clear_explicit(&session->busy, memory_order_release);
}

mq_status mq_session_set_output_depth(mq_session *session, uint32_t depth, mq_error *error)
{
    depth = depth == 0 ? session->model->hparams.output_depth : depth;
    uint32_t available = 0;
    while (available < MQ_SLICE_COUNT && session->model->output.plane[available] != NULL) {
        available++;
    }
    if (depth > available) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "output depth: expected 1 to %" PRIu32 ", the slices in %s, found %" PRIu32,
                       available, session->model->path, depth);
    }
    const mq_status status = mq_session_acquire(session, error);
    if (status == MQ_OK) {
        session->output_depth = depth;
        mq_session_release(session);
    }
    return status;
}

static mq_status check_tokens(const mq_session *session, const int32_t *tokens, size_t n, size_t n_logits, mq_error *error)
{
    const uint32_t vocab = session->model->hparams.vocab_size;
    if (n > session->n_ctx - session->position) {
        return mq_fail(error, MQ_ERR_CONTEXT_FULL, "%zu tokens do not fit: %" PRIu32 " of %" PRIu32 " positions are left", n,
                       session->n_ctx - session->position, session->n_ctx);
    }
    if (n_logits > n) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "rows of output: expected at most the %zu tokens given, found %zu", n, n_logits);
    }
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= vocab) {
            return mq_fail(error, MQ_ERR_ARGUMENT, "token %zu: expected an id from 0 to %" PRIu32 ", found %" PRId32, i, vocab - 1,
                           tokens[i]);
        }
    }
    return MQ_OK;
}

/* Positions before this one are no longer in every ring, now that the ones before session->position are written. What a rewind
 * let go stays lost: a ring's slots are those of the furthest position that it ever held. */
static uint32_t forgotten(const mq_session *session)
{
    size_t oldest = session->oldest;
    for (uint32_t i = 0; i < session->model->hparams.block_count; i++) {
        const size_t slots = session->caches[i].slots;
        oldest = session->position > oldest + slots ? session->position - slots : oldest;
    }
    return (uint32_t)oldest;
}

/* Of the last n_output tokens: rows of logits, or, with `hidden`, of hidden states. */
static mq_status evaluate(mq_session *session, const int32_t *tokens, size_t n, float *output, size_t n_output, bool hidden,
                          mq_error *error)
{
    mq_status status = mq_session_acquire(session, error);
    if (status != MQ_OK) {
        return status;
    }
    const mq_hparams *hp = &session->model->hparams;
    const size_t row = hidden ? hp->embedding_length : hp->vocab_size;
    const uint32_t before = session->position;
    status = check_tokens(session, tokens, n, n_output, error);
    for (size_t done = 0; done < n && status == MQ_OK;) {
        const size_t left = n - done;
        const uint32_t count = mq_budget_begin(session, left < session->n_batch ? (uint32_t)left : session->n_batch);
        const size_t after = left - count; /* tokens still to come */
        const size_t wanted = n_output > after ? n_output - after : 0;
        const uint32_t here = wanted < count ? (uint32_t)wanted : count;
        if (session->device != NULL) {
            status = mq_device_forward(session, tokens + done, count, output, hidden ? 0 : here, output, hidden ? here : 0, error);
        } else {
            mq_forward(session, tokens + done, count, output, hidden ? 0 : here);
            if (hidden) {
                mq_forward_hidden(session, count, output, here);
            }
        }
        output = here > 0 ? output + here * row : output;
        n_output -= here;
        session->position += status == MQ_OK ? count : 0;
        session->oldest = forgotten(session);
        done += count;
    }
    session->position = status == MQ_OK ? session->position : before;
    mq_session_release(session);
    return status;
}

mq_status mq_session_eval(mq_session *session, const int32_t *tokens, size_t n, float *logits, size_t n_logits, mq_error *error)
{
    return evaluate(session, tokens, n, logits, n_logits, false, error);
}

mq_status mq_session_eval_hidden(mq_session *session, const int32_t *tokens, size_t n, float *hidden, size_t n_hidden,
                                 mq_error *error)
{
    return evaluate(session, tokens, n, hidden, n_hidden, true, error);
}

/* The index of the largest value, of equal ones the first. */
static int32_t most_likely(const float *logits, size_t vocab)
{
    size_t best = 0;
    for (size_t i = 1; i < vocab; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return (int32_t)best;
}

static mq_status greedy_step(mq_session *session, int32_t token, uint32_t n, float *logits, int32_t *chosen, float *milliseconds,
                             mq_error *error)
{
    if (session->device != NULL) {
        return mq_device_greedy(session, token, n, chosen, milliseconds, error);
    }
    for (uint32_t i = 0; i < n; i++, session->position++) {
        mq_forward(session, &token, 1, logits, 1);
        token = chosen[i] = most_likely(logits, session->model->hparams.vocab_size);
    }
    session->position -= n;
    return MQ_OK;
}

mq_status mq_session_greedy(mq_session *session, int32_t token, size_t n, int32_t *chosen, float *milliseconds, mq_error *error)
{
    mq_status status = mq_session_acquire(session, error);
    if (status != MQ_OK) {
        return status;
    }
    const uint32_t before = session->position;
    float *logits = NULL, total = 0.0f;
    status = check_tokens(session, &token, n < 1 ? n : 1, 0, error);
    if (status == MQ_OK && n > session->n_ctx - session->position) {
        status = mq_fail(error, MQ_ERR_CONTEXT_FULL, "%zu tokens do not fit: %" PRIu32 " of %" PRIu32 " positions are left", n,
                         session->n_ctx - session->position, session->n_ctx);
    }
    if (status == MQ_OK && session->device == NULL) {
        logits = mq_alloc(session->model->hparams.vocab_size, sizeof *logits);
        status = logits == NULL ? mq_fail(error, MQ_ERR_MEMORY, "cannot allocate one token's logits") : MQ_OK;
    }
    for (size_t done = 0; done < n && status == MQ_OK;) {
        const size_t left = n - done;
        const uint32_t count = mq_budget_begin(session, left < UINT32_MAX ? (uint32_t)left : UINT32_MAX);
        float here = 0.0f;
        status = greedy_step(session, done == 0 ? token : chosen[done - 1], count, logits, chosen + done, &here, error);
        session->position += status == MQ_OK ? count : 0;
        session->oldest = forgotten(session);
        total += here;
        done += count;
    }
    free(logits);
    session->position = status == MQ_OK ? session->position : before;
    if (milliseconds != NULL) {
        *milliseconds = total;
    }
    mq_session_release(session);
    return status;
}

uint32_t mq_session_position(const mq_session *session)
{
    return session->position;
}

uint32_t mq_session_context(const mq_session *session)
{
    return session->n_ctx;
}

size_t mq_session_cache_bytes(const mq_session *session)
{
    return session->cache_bytes;
}

uint32_t mq_session_rewind_floor(const mq_session *session)
{
    const uint32_t window = session->model->hparams.sliding_window;
    return session->oldest == 0 ? 0 : session->oldest + window - 1; /* its token sees from `oldest` on */
}

mq_status mq_session_rewind(mq_session *session, uint32_t position, mq_error *error)
{
    mq_status status = mq_session_acquire(session, error);
    if (status != MQ_OK) {
        return status;
    }
    if (position > session->position) {
        status = mq_fail(error, MQ_ERR_ARGUMENT, "position: expected at most %" PRIu32 ", found %" PRIu32, session->position,
                         position);
    } else if (position != 0 && position != session->position && position < mq_session_rewind_floor(session)) {
        status = mq_fail(error, MQ_ERR_FORGOTTEN, "position: expected 0, or at least %" PRIu32 ": of those before, the cache no longer "
                         "holds the sliding window of %" PRIu32 " positions; found %" PRIu32, mq_session_rewind_floor(session),
                         session->model->hparams.sliding_window, position);
    } else {
        session->position = position;
        session->oldest = position == 0 ? 0 : session->oldest;
        session->stretch_end = 0;
    }
    mq_session_release(session);
    return status;
}

void mq_session_get_stats(const mq_session *session, mq_stats *stats)
{
    *stats = session->stats;
}

mq_status mq_session_depths(const mq_session *session, uint32_t first, uint32_t n, uint8_t *depths, mq_error *error)
{
    if (first > session->position || n > session->position - first) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "positions %" PRIu32 " to %" PRIu64 ": expected positions below %" PRIu32, first,
                       (uint64_t)first + n, session->position);
    }
    const size_t row = (size_t)session->model->hparams.block_count * MQ_LINEARS;
    memcpy(depths, session->depths + first * row, n * row);
    return MQ_OK;
}
