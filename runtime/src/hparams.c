/* hparams.c: one table of limits; nothing is allocated from a number that is not in it. */
#include "hparams.h"

#include "cache.h"
#include "error.h"
#include "keys.h"

#include <inttypes.h>
#include <string.h>

typedef struct limit {
    const char *key;
    size_t field; /* offset in mq_hparams */
    uint32_t low, high;
} limit;

#define FIELD(name) offsetof(mq_hparams, name)

static const limit LIMITS[] = {
    {MQ_KEY_VOCAB_SIZE, FIELD(vocab_size), 1, 1u << 20},
    {MQ_KEY_CONTEXT_LENGTH, FIELD(context_length), 1, 1u << 20},
    {MQ_KEY_EMBEDDING_LENGTH, FIELD(embedding_length), 1, 1u << 16},
    {MQ_KEY_BLOCK_COUNT, FIELD(block_count), 1, 1024},
    {MQ_KEY_FEED_FORWARD_LENGTH, FIELD(feed_forward_length), 1, 1u << 18},
    {MQ_KEY_HEAD_COUNT, FIELD(head_count), 1, 1024},
    {MQ_KEY_HEAD_COUNT_KV, FIELD(head_count_kv), 1, 1024},
    {MQ_KEY_HEAD_DIM, FIELD(head_dim), 2, MQ_MAX_HEAD_DIM},
    {MQ_KEY_EMBEDDING_DEPTH, FIELD(embedding_depth), 1, MQ_SLICE_COUNT},
    {MQ_KEY_OUTPUT_DEPTH, FIELD(output_depth), 1, MQ_SLICE_COUNT},
    {MQ_KEY_ROUTER_HIDDEN, FIELD(router_hidden), 1, MQ_MAX_ROUTER_HIDDEN},
};

/* Keys that must have one value in this version of the format. */
static const struct { const char *key; uint32_t value; } FIXED[] = {
    {MQ_KEY_FORMAT_VERSION, MQ_FORMAT_VERSION},
    {MQ_KEY_SLICE_COUNT, MQ_SLICE_COUNT},
    {MQ_KEY_SLICE_BITS, MQ_SLICE_BITS},
    {MQ_KEY_GROUP_SIZE, MQ_GROUP_SIZE},
};

static mq_status read_budgets(const gguf_file *file, mq_hparams *hparams, mq_error *error)
{
    const gguf_key *key = gguf_find_key(file, MQ_KEY_ROUTER_BUDGETS);
    if (key == NULL || !key->is_array || key->type != GGUF_F32 || key->count < 2 || key->count > MQ_MAX_BUDGETS) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected an array of 2 to %d f32, found %s", file->path,
                       MQ_KEY_ROUTER_BUDGETS, MQ_MAX_BUDGETS, key == NULL ? "none" : "another type or length");
    }
    hparams->budget_count = (uint32_t)key->count;
    memcpy(hparams->budgets, key->value, key->count * sizeof(float));
    const float *budgets = hparams->budgets;
    int32_t ascending = budgets[0] == (float)MQ_SLICE_BITS
                        && budgets[key->count - 1] == (float)(MQ_SLICE_BITS * MQ_SLICE_COUNT);
    for (size_t i = 1; i < key->count; i++) {
        ascending = ascending && budgets[i] > budgets[i - 1];
    }
    if (!ascending) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected values that ascend from 2 to 8", file->path,
                       MQ_KEY_ROUTER_BUDGETS);
    }
    return MQ_OK;
}

static mq_status check_relations(const gguf_file *file, const mq_hparams *hparams, mq_error *error)
{
    if (hparams->head_count % hparams->head_count_kv != 0) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: expected %s to be a multiple of %s, found %" PRIu32 " and %" PRIu32, file->path,
                       MQ_KEY_HEAD_COUNT, MQ_KEY_HEAD_COUNT_KV, hparams->head_count, hparams->head_count_kv);
    }
    if (hparams->head_dim % 2 != 0) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected an even number (rotary halves), found %" PRIu32, file->path,
                       MQ_KEY_HEAD_DIM, hparams->head_dim);
    }
    if (!(hparams->rms_epsilon >= 0.0f && hparams->rms_epsilon <= 1.0f)) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected 0 to 1, found %g", file->path, MQ_KEY_RMS_EPSILON,
                       (double)hparams->rms_epsilon);
    }
    return MQ_OK;
}

mq_status mq_hparams_of_block(const gguf_file *file, const char *name, const mq_hparams *hparams, uint32_t block, uint32_t high,
                              uint32_t *value, mq_error *error)
{
    const gguf_key *key = gguf_find_key(file, name);
    if (key == NULL) {
        return MQ_OK;
    }
    if (!key->is_array || key->type != GGUF_U32 || key->count != hparams->block_count) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected an array of %" PRIu32 " u32, found %" PRIu64 " of type %"
                       PRIu32, file->path, name, hparams->block_count, key->count, key->type);
    }
    memcpy(value, key->value + block * sizeof *value, sizeof *value);
    if (*value > high) {
        return mq_fail(error, MQ_ERR_UNSUPPORTED, "%s: key '%s': expected 0 to %" PRIu32 ", found %" PRIu32 " for block %" PRIu32,
                       file->path, name, high, *value, block);
    }
    return MQ_OK;
}

mq_status mq_hparams_read(const gguf_file *file, mq_hparams *hparams, mq_error *error)
{
    *hparams = (mq_hparams){0};
    mq_status status = MQ_OK;
    for (size_t i = 0; i < sizeof FIXED / sizeof FIXED[0] && status == MQ_OK; i++) {
        uint32_t value = 0;
        status = gguf_u32(file, FIXED[i].key, &value, error);
        if (status == MQ_OK && value != FIXED[i].value) {
            status = mq_fail(error, MQ_ERR_UNSUPPORTED, "%s: key '%s': expected %" PRIu32 ", found %" PRIu32, file->path,
                             FIXED[i].key, FIXED[i].value, value);
        }
    }
    if (status == MQ_OK) {
        status = gguf_expect_string(file, MQ_KEY_LAYOUT, MQ_LAYOUT, MQ_ERR_UNSUPPORTED, error);
    }
    if (status == MQ_OK) {
        status = gguf_expect_string(file, MQ_KEY_BASE_ARCHITECTURE, "llama", MQ_ERR_UNSUPPORTED, error);
    }
    for (size_t i = 0; i < sizeof LIMITS / sizeof LIMITS[0] && status == MQ_OK; i++) {
        uint32_t value = 0;
        status = gguf_u32(file, LIMITS[i].key, &value, error);
        if (status == MQ_OK && (value < LIMITS[i].low || value > LIMITS[i].high)) {
            status = mq_fail(error, MQ_ERR_UNSUPPORTED, "%s: key '%s': expected %" PRIu32 " to %" PRIu32 ", found %" PRIu32,
                             file->path, LIMITS[i].key, LIMITS[i].low, LIMITS[i].high, value);
        }
        memcpy((char *)hparams + LIMITS[i].field, &value, sizeof value);
    }
    if (status == MQ_OK) {
        status = gguf_f32(file, MQ_KEY_RMS_EPSILON, &hparams->rms_epsilon, error);
    }
    if (status == MQ_OK && gguf_find_key(file, MQ_KEY_SLIDING_WINDOW) != NULL) {
        status = gguf_u32(file, MQ_KEY_SLIDING_WINDOW, &hparams->sliding_window, error);
    }
    if (status == MQ_OK) {
        status = check_relations(file, hparams, error);
    }
    if (status == MQ_OK) {
        status = read_budgets(file, hparams, error);
    }
    return status;
}
