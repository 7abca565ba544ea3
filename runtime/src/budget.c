/* budget.c: the precision that a session's next tokens read: one depth for all, one per linear, or routed. */
#include "error.h"
#include "session.h"
#include "static_order.h"

#include <inttypes.h>
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
        session->routed = 0;
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
        session->routed = 0;
        mq_static_depths(model, bits, session->table);
        mq_session_release(session);
    }
    return status;
}

mq_status mq_session_set_average_bits(mq_session *session, float bits, mq_error *error)
{
    const mq_model *model = session->model;
    mq_status status = check_bits(model, "average bits", bits, error);
    if (status == MQ_OK) {
        status = mq_session_acquire(session, error);
    }
    if (status != MQ_OK) {
        return status;
    }
    session->routed = 1;
    float *thresholds = session->thresholds;
    for (uint32_t i = 0; i < model->hparams.block_count; i++) {
        for (size_t j = 0; j < MQ_ROUTERS; j++) {
            const mq_router *router = &model->blocks[i].router[j];
            mq_router_thresholds(router, &model->hparams, bits, thresholds);
            thresholds += (size_t)router->linears * MQ_GATES;
        }
    }
    mq_session_release(session);
    return MQ_OK;
}
