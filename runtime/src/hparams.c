/* hparams.c: the table of hyper-parameters with the limits of file_limits.h; nothing is allocated from a number that is not in it. */
#include "hparams.h"

#include "error.h"
#include "keys.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

typedef struct limit {
    const char *key;
    size_t field; /* offset in mq_hparams */
    uint32_t low, high;
} limit;

#define FIELD(name) offsetof(mq_hparams, name)

static const limit LIMITS[] = {
    {MQ_KEY_VOCAB_SIZE, FIELD(vocab_size), 1, MQ_MAX_VOCAB_SIZE},
    {MQ_KEY_CONTEXT_LENGTH, FIELD(context_length), 1, MQ_MAX_CONTEXT_LENGTH},
    {MQ_KEY_EMBEDDING_LENGTH, FIELD(embedding_length), 1, MQ_MAX_EMBEDDING_LENGTH},
    {MQ_KEY_BLOCK_COUNT, FIELD(block_count), 1, MQ_MAX_BLOCK_COUNT},
    {MQ_KEY_FEED_FORWARD_LENGTH, FIELD(feed_forward_length), 1, MQ_MAX_FEED_FORWARD_LENGTH},
    {MQ_KEY_HEAD_COUNT, FIELD(head_count), 1, MQ_MAX_HEAD_COUNT},
    {MQ_KEY_HEAD_COUNT_KV, FIELD(head_count_kv), 1, MQ_MAX_HEAD_COUNT},
    {MQ_KEY_HEAD_DIM, FIELD(head_dim), 1, MQ_MAX_HEAD_DIM},
    {MQ_KEY_EMBEDDING_DEPTH, FIELD(embedding_depth), 1, MQ_SLICE_COUNT},
    {MQ_KEY_OUTPUT_DEPTH, FIELD(output_depth), 1, MQ_SLICE_COUNT},
    {MQ_KEY_ROUTER_HIDDEN, FIELD(router_hidden), 1, MQ_MAX_ROUTER_HIDDEN},
};

/* Optional keys; read_optional sets the defaults. */
static const limit OPTIONAL_LIMITS[] = {
    {MQ_KEY_ROPE_DIMENSION, FIELD(rope_dim), 2, MQ_MAX_HEAD_DIM},
    {MQ_KEY_SLIDING_WINDOW, FIELD(sliding_window), 1, MQ_MAX_CONTEXT_LENGTH},
    {MQ_KEY_ROPE_ORIGINAL, FIELD(rope_original), 1, MQ_MAX_CONTEXT_LENGTH},
};

static const struct { const char *key; size_t field; float low, high; } OPTIONAL_FLOATS[] = {
    {MQ_KEY_ATTENTION_SCALE, FIELD(attention_scale), 1e-6f, 1e3f},
    {MQ_KEY_ATTENTION_SOFTCAP, FIELD(attention_softcap), 1e-3f, 1e6f},
    {MQ_KEY_OUTPUT_SOFTCAP, FIELD(output_softcap), 1e-3f, 1e6f},
    {MQ_KEY_EMBEDDING_SCALE, FIELD(embedding_scale), 1e-6f, 1e6f},
    {MQ_KEY_ROPE_FACTOR, FIELD(rope_factor), 1.0f, 1e4f},
    {MQ_KEY_ROPE_ATTENTION, FIELD(rope_attention), 1e-3f, 1e3f},
};

static const char *const BASE_ARCHITECTURES[] = MQ_BASE_ARCHITECTURES;
static const char *const ACTIVATIONS[] = MQ_ACTIVATIONS;
static const char *const ROPE_SCALINGS[] = MQ_ROPE_SCALINGS;

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
    if (hparams->rope_dim % 2 != 0 || hparams->rope_dim > hparams->head_dim) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected an even number (rotary halves) of at most %" PRIu32 ", found "
                       "%" PRIu32, file->path, gguf_find_key(file, MQ_KEY_ROPE_DIMENSION) ? MQ_KEY_ROPE_DIMENSION
                       : MQ_KEY_HEAD_DIM, hparams->head_dim, hparams->rope_dim);
    }
    if (hparams->rope_scaling == MQ_SCALING_DYNAMIC
        && (hparams->rope_factor == 0.0f || hparams->rope_original == 0 || hparams->rope_dim < 4)) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': dynamic needs %s, %s and at least 4 rotated dimensions", file->path,
                       MQ_KEY_ROPE_SCALING, MQ_KEY_ROPE_FACTOR, MQ_KEY_ROPE_ORIGINAL);
    }
    if (!(hparams->rms_epsilon >= 0.0f && hparams->rms_epsilon <= 1.0f)) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected 0 to 1, found %g", file->path, MQ_KEY_RMS_EPSILON,
                       (double)hparams->rms_epsilon);
    }
    return MQ_OK;
}

static mq_status read_limit(const gguf_file *file, const limit *limit, mq_hparams *hparams, mq_error *error)
{
    uint32_t value = 0;
    const mq_status status = gguf_u32(file, limit->key, &value, error);
    if (status == MQ_OK && (value < limit->low || value > limit->high)) {
        return mq_fail(error, MQ_ERR_UNSUPPORTED, "%s: key '%s': expected %" PRIu32 " to %" PRIu32 ", found %" PRIu32, file->path,
                       limit->key, limit->low, limit->high, value);
    }
    memcpy((char *)hparams + limit->field, &value, sizeof value);
    return status;
}

static mq_status read_optional(const gguf_file *file, mq_hparams *hparams, mq_error *error)
{
    hparams->rope_dim = hparams->head_dim;
    hparams->attention_scale = 1.0f / sqrtf((float)hparams->head_dim);
    hparams->embedding_scale = 1.0f;
    hparams->rope_attention = 1.0f;
    mq_status status = MQ_OK;
    for (size_t i = 0; i < sizeof OPTIONAL_LIMITS / sizeof OPTIONAL_LIMITS[0] && status == MQ_OK; i++) {
        if (gguf_find_key(file, OPTIONAL_LIMITS[i].key) != NULL) {
            status = read_limit(file, &OPTIONAL_LIMITS[i], hparams, error);
        }
    }
    for (size_t i = 0; i < sizeof OPTIONAL_FLOATS / sizeof OPTIONAL_FLOATS[0] && status == MQ_OK; i++) {
        if (gguf_find_key(file, OPTIONAL_FLOATS[i].key) == NULL) {
            continue;
        }
        float value = 0.0f;
        status = gguf_f32(file, OPTIONAL_FLOATS[i].key, &value, error);
        if (status == MQ_OK && !(value >= OPTIONAL_FLOATS[i].low && value <= OPTIONAL_FLOATS[i].high)) {
            status = mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected %g to %g, found %g", file->path, OPTIONAL_FLOATS[i].key,
                             (double)OPTIONAL_FLOATS[i].low, (double)OPTIONAL_FLOATS[i].high, (double)value);
        }
        memcpy((char *)hparams + OPTIONAL_FLOATS[i].field, &value, sizeof value);
    }
    if (status == MQ_OK && gguf_find_key(file, MQ_KEY_ACTIVATION) != NULL) {
        status = gguf_choice(file, MQ_KEY_ACTIVATION, ACTIVATIONS, sizeof ACTIVATIONS / sizeof ACTIVATIONS[0],
                             &hparams->activation, error);
    }
    if (status == MQ_OK && gguf_find_key(file, MQ_KEY_ROPE_SCALING) != NULL) {
        status = gguf_choice(file, MQ_KEY_ROPE_SCALING, ROPE_SCALINGS, sizeof ROPE_SCALINGS / sizeof ROPE_SCALINGS[0],
                             &hparams->rope_scaling, error);
    }
    return status;
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
        uint32_t architecture = 0; /* known is enough: the flags say what it computes */
        status = gguf_choice(file, MQ_KEY_BASE_ARCHITECTURE, BASE_ARCHITECTURES,
                             sizeof BASE_ARCHITECTURES / sizeof BASE_ARCHITECTURES[0], &architecture, error);
    }
    for (size_t i = 0; i < sizeof LIMITS / sizeof LIMITS[0] && status == MQ_OK; i++) {
        status = read_limit(file, &LIMITS[i], hparams, error);
    }
    if (status == MQ_OK) {
        status = gguf_f32(file, MQ_KEY_RMS_EPSILON, &hparams->rms_epsilon, error);
    }
    if (status == MQ_OK) {
        status = read_optional(file, hparams, error);
    }
    if (status == MQ_OK) {
        status = check_relations(file, hparams, error);
    }
    if (status == MQ_OK) {
        status = read_budgets(file, hparams, error);
    }
    return status;
}
