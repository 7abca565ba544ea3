/* session.c: evaluation by the C API: the checks before a forward pass, what follows one, and what a session tells. */
#include "session.h"

#include "budget.h"
#include "device.h"
#include "error.h"
#include "memory.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#ifndef MQ_VERSION
#define MQ_VERSION "unversioned"
#endif

const char *mq_version(void)
{
    return MQ_VERSION;
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

static mq_status check_tokens(const mq_session *session, const int32_t *tokens, size_t n, const float *output, size_t n_logits,
                              mq_error *error)
{
    if ((n > 0 && tokens == NULL) || (n_logits > 0 && output == NULL)) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "expected %zu tokens and room for %zu rows of output, found NULL", n, n_logits);
    }
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
    status = check_tokens(session, tokens, n, output, n_output, error);
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
    if (logits == NULL) { /* on a GPU they stay there */
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
    status = check_tokens(session, &token, n < 1 ? n : 1, NULL, 0, error);
    if (status == MQ_OK && n > 0 && chosen == NULL) {
        status = mq_fail(error, MQ_ERR_ARGUMENT, "expected room for %zu tokens, found NULL", n);
    }
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
