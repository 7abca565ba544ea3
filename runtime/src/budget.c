/* budget.c: the precision that a session's next tokens read: one depth for all, one per linear, or routed.
 *
 * Thresholds come from the calibration text, and another text spends up to 0.3 bits more or less under them. So a routed
 * session compares what was read with what was asked, after every stretch, and routes the next stretch by a corrected budget.
 */
#include "budget.h"

#include "error.h"
#include "static_order.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

mq_status mq_session_set_depth(mq_session *session, uint32_t depth, mq_error *error)
{
    const mq_model *model = session->model;
    if (depth < 1 || depth > model->info.max_depth) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "depth: expected 1 to %" PRIu32 ", the slices in %s, found %" PRIu32,
                       model->info.max_depth, model->path, depth);
    }
    const mq_status status = mq_session_acquire(session, error);
    if (status == MQ_OK) {
        session->asked_bits = 0.0f;
        session->budget_changed = true;
        memset(session->table, (int)depth, (size_t)model->hparams.block_count * MQ_LINEARS);
        mq_session_release(session);
    }
    return status;
}

static mq_status check_bits(const mq_model *model, const char *what, float bits, mq_error *error)
{
    const float most = (float)(MQ_SLICE_BITS * model->info.max_depth);
    if (!(bits >= (float)MQ_SLICE_BITS && bits <= most)) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "%s: expected %d to %g, found %g", what, MQ_SLICE_BITS, (double)most, (double)bits);
    }
    return MQ_OK;
}

mq_status mq_session_set_static_bits(mq_session *session, float bits, mq_error *error)
{
    const mq_model *model = session->model;
    mq_status status = check_bits(model, "static bits", bits, error);
    if (status == MQ_OK && model->static_order == NULL) {
        status = mq_fail(error, MQ_ERR_ARGUMENT, "static bits: %s has no key '%s'; calibrate and export the model again",
                         model->path, MQ_KEY_STATIC_ORDER);
    }
    if (status == MQ_OK) {
        status = mq_session_acquire(session, error);
    }
    if (status == MQ_OK) {
        session->asked_bits = 0.0f;
        session->budget_changed = true;
        mq_static_depths(model, bits, session->table);
        mq_session_release(session);
    }
    return status;
}

mq_status mq_session_set_average_bits(mq_session *session, float bits, mq_error *error)
{
    mq_status status = check_bits(session->model, "average bits", bits, error);
    if (status == MQ_OK) {
        status = mq_session_acquire(session, error);
    }
    if (status == MQ_OK) {
        session->asked_bits = bits;
        session->stretch_end = 0;
        mq_session_release(session);
    }
    return status;
}

/* Tokens in the stretch that begins `done` tokens after the budget did: half as many, rounded down to a power of two. */
static uint32_t stretch_length(uint32_t done)
{
    enum { SHORTEST = 64, LONGEST = 512, SHARE = 2 };
    uint32_t length = SHORTEST;
    while (length < LONGEST && length * 2 <= done / SHARE) {
        length *= 2;
    }
    return length;
}

/* Sum over tokens first..end-1 and routed linears of 2·depth·weights. */
static uint64_t bits_read(const mq_session *session, uint32_t first, uint32_t end)
{
    const mq_model *model = session->model;
    const size_t blocks = model->hparams.block_count;
    uint64_t depths[MQ_LINEARS] = {0}, bits = 0;
    for (size_t i = first * blocks; i < end * blocks; i++) {
        for (size_t j = 0; j < MQ_LINEARS; j++) {
            depths[j] += session->depths[i * MQ_LINEARS + j];
        }
    }
    for (size_t j = 0; j < MQ_LINEARS; j++) {
        const mq_matrix *matrix = &model->blocks[0].linear[j]; /* every block has the same shapes */
        bits += MQ_SLICE_BITS * depths[j] * matrix->rows * matrix->columns;
    }
    return bits;
}

/* The budget for a stretch of `length` tokens after `done` tokens that were given `given` bits and read `average`: what is
 * asked, plus what the text reads less than it is given, plus what is owed, as far as one stretch can pay it back. */
static float corrected_bits(float asked, double given, double average, uint32_t done, uint32_t length)
{
    static const double TRUST = 64.0, REACH = 1.0; /* TRUST: tokens at which half of a measured bias is believed */
    const double bias = (given - average) * ((double)done / ((double)done + TRUST));
    const double owed = ((double)asked - average) * ((double)done / (double)length);
    const double shift = fmin(fmax(bias + owed, -REACH), REACH);
    return (float)fmin(fmax((double)asked + shift, (double)MQ_SLICE_BITS), (double)(MQ_SLICE_BITS * MQ_SLICE_COUNT));
}

/* The budget at the position, found anew from the depths since the budget asked for began. So it depends on what was read and
 * on nothing else: not on batches, nor on positions that were rewound. *end: where it stops to hold. */
static float effective_bits(const mq_session *session, uint32_t *end)
{
    const float asked = session->asked_bits;
    const uint64_t weights = session->model->info.routed_weights;
    uint32_t origin = session->position;
    while (origin > 0 && session->asked_at[origin - 1] == asked) {
        origin--;
    }
    double given = 0.0;
    uint64_t read = 0;
    float bits = asked;
    uint32_t done = 0, length = stretch_length(0);
    while (length <= session->position - origin - done) {
        given += (double)bits * (double)length;
        read += bits_read(session, origin + done, origin + done + length);
        done += length;
        length = stretch_length(done);
        bits = corrected_bits(asked, given / (double)done, (double)read / ((double)weights * (double)done), done, length);
    }
    *end = origin + done + length;
    return bits;
}

static void set_thresholds(mq_session *session, float bits)
{
    const mq_hparams *hp = &session->model->hparams;
    float *thresholds = session->thresholds;
    session->budget_changed = true;
    for (uint32_t i = 0; i < hp->block_count; i++) {
        for (size_t j = 0; j < MQ_ROUTERS; j++) {
            const mq_router *router = &session->model->blocks[i].router[j];
            mq_router_thresholds(router, hp, bits, thresholds);
            thresholds += (size_t)router->linears * MQ_GATES;
        }
    }
}

uint32_t mq_budget_begin(mq_session *session, uint32_t n)
{
    const float asked = session->asked_bits;
    if (asked != 0.0f && session->position >= session->stretch_end) {
        if (asked <= (float)MQ_SLICE_BITS || asked >= (float)(MQ_SLICE_BITS * session->model->info.max_depth)) {
            session->stretch_end = UINT32_MAX; /* the least and the most are exact */
            set_thresholds(session, asked <= (float)MQ_SLICE_BITS ? asked : (float)(MQ_SLICE_BITS * MQ_SLICE_COUNT));
        } else {
            uint32_t end = 0;
            set_thresholds(session, effective_bits(session, &end));
            session->stretch_end = end;
        }
    }
    const uint32_t left = asked != 0.0f ? session->stretch_end - session->position : n;
    const uint32_t count = n < left ? n : left;
    for (uint32_t i = 0; i < count; i++) {
        session->asked_at[session->position + i] = asked;
    }
    return count;
}
