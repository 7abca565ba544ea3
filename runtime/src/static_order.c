/* static_order.c: reading the list strictly, and spending a budget along it. */
#include "static_order.h"

#include "error.h"
#include "memory.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static mq_status check_order(const gguf_file *file, const uint32_t *order, size_t linears, uint8_t *raises, mq_error *error)
{
    enum { MOST = MQ_SLICE_COUNT - 1 };
    for (size_t i = 0; i < MOST * linears; i++) {
        if (order[i] >= linears) {
            return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected linears below %zu, found %" PRIu32, file->path,
                           MQ_KEY_STATIC_ORDER, linears, order[i]);
        }
        if (++raises[order[i]] > MOST) {
            return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected every linear %d times, found linear %" PRIu32 " more "
                           "often", file->path, MQ_KEY_STATIC_ORDER, MOST, order[i]);
        }
    }
    return MQ_OK; /* none too often in a list of this length: none too seldom */
}

mq_status mq_static_order_read(const gguf_file *file, uint32_t block_count, uint32_t **out, mq_error *error)
{
    *out = NULL;
    const gguf_key *key = gguf_find_key(file, MQ_KEY_STATIC_ORDER);
    if (key == NULL) {
        return MQ_OK;
    }
    const size_t linears = (size_t)block_count * MQ_LINEARS, count = (MQ_SLICE_COUNT - 1) * linears;
    if (!key->is_array || key->type != GGUF_U32 || key->count != count) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected an array of %zu u32, found %" PRIu64 " of type %" PRIu32,
                       file->path, MQ_KEY_STATIC_ORDER, count, key->count, key->type);
    }
    uint32_t *order = mq_alloc(count, sizeof *order);
    uint8_t *raises = mq_alloc(linears, sizeof *raises);
    mq_status status = MQ_OK;
    if (order == NULL || raises == NULL) {
        status = mq_fail(error, MQ_ERR_MEMORY, "%s: cannot allocate the static order of %zu linears", file->path, linears);
    } else {
        memcpy(order, key->value, count * sizeof *order); /* unaligned in the file */
        status = check_order(file, order, linears, raises, error);
    }
    free(raises);
    if (status != MQ_OK) {
        free(order);
        return status;
    }
    *out = order;
    return MQ_OK;
}

void mq_static_depths(const mq_model *model, float bits, uint8_t *depths)
{
    const size_t linears = (size_t)model->hparams.block_count * MQ_LINEARS;
    const double limit = (double)bits * (double)model->info.routed_weights;
    uint64_t spent = MQ_SLICE_BITS * model->info.routed_weights;
    memset(depths, 1, linears);
    for (size_t i = 0; i < (MQ_SLICE_COUNT - 1) * linears; i++) {
        const uint32_t linear = model->static_order[i];
        if (depths[linear] == model->info.max_depth) {
            continue;
        }
        const mq_matrix *matrix = &model->blocks[linear / MQ_LINEARS].linear[linear % MQ_LINEARS];
        spent += (uint64_t)MQ_SLICE_BITS * matrix->rows * matrix->columns;
        if ((double)spent > limit) {
            return; /* a prefix, so that a larger budget never lowers a depth */
        }
        depths[linear]++;
    }
}
