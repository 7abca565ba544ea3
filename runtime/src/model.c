/* model.c: binding the tensors of a file to the model: each must be there once, with its exact type and shape. */
#include "model.h"

#include "device.h"
#include "error.h"
#include "memory.h"
#include "router.h"
#include "static_order.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_SIZE = 64 };

static const char *const LINEAR_NAMES[MQ_LINEARS] = MQ_LINEAR_NAMES;
static const char *const ROUTER_NAMES[MQ_ROUTERS] = MQ_ROUTER_NAMES;
static const uint32_t ROUTER_LINEARS[MQ_ROUTERS] = MQ_ROUTER_LINEARS;

typedef struct binder {
    mq_model *model;
    mq_error *error;
    size_t bound; /* tensors found so far */
} binder;

/* Find `name`, check type and shape (numpy order, leading 1s). *data is NULL when the file was cut before it. */
static mq_status bind(binder *b, const char *name, uint32_t type, const uint64_t shape[4], const void **data)
{
    const gguf_file *file = &b->model->file;
    const gguf_tensor *tensor = gguf_find_tensor(file, name);
    if (tensor == NULL) {
        return mq_fail(b->error, MQ_ERR_FORMAT, "%s: tensor '%s' is missing", file->path, name);
    }
    if (tensor->type != type) {
        return mq_fail(b->error, MQ_ERR_FORMAT, "%s: tensor '%s': expected type %" PRIu32 ", found %" PRIu32, file->path, name,
                       type, tensor->type);
    }
    if (memcmp(tensor->shape, shape, sizeof tensor->shape) != 0) {
        return mq_fail(b->error, MQ_ERR_FORMAT, "%s: tensor '%s': expected shape (%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64
                       "), found (%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ")", file->path, name, shape[0], shape[1],
                       shape[2], shape[3], tensor->shape[0], tensor->shape[1], tensor->shape[2], tensor->shape[3]);
    }
    *data = tensor->present ? file->data + tensor->offset : NULL;
    b->bound++;
    return MQ_OK;
}

/* A tensor without which nothing runs, partial file or not. */
static mq_status bind_needed(binder *b, const char *name, uint32_t type, const uint64_t shape[4], const void **data)
{
    const mq_status status = bind(b, name, type, shape, data);
    if (status == MQ_OK && *data == NULL) {
        return mq_fail(b->error, MQ_ERR_TRUNCATED, "%s: the file ends at byte %zu, before tensor '%s', which even a 2-bit model "
                       "needs", b->model->file.path, b->model->file.size, name);
    }
    return status;
}

static mq_status bind_f32(binder *b, const char *name, uint32_t count, const float **data)
{
    const uint64_t shape[4] = {1, 1, 1, count};
    const void *found = NULL;
    const mq_status status = bind_needed(b, name, GGML_F32, shape, &found);
    *data = found;
    return status;
}

/* Slices 1..needed must be there; of the others, those that the file still holds. */
static mq_status bind_matrix(binder *b, const char *prefix, uint32_t rows, uint32_t columns, uint32_t needed, mq_matrix *matrix)
{
    char name[NAME_SIZE];
    matrix->rows = rows;
    matrix->columns = columns;
    matrix->tiles = (rows + MQ_TILE_ROWS - 1) / MQ_TILE_ROWS;
    matrix->groups = (columns + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE;
    const uint64_t scale_shape[4] = {matrix->tiles, matrix->groups, 2, MQ_TILE_ROWS};
    (void)snprintf(name, sizeof name, "%s." MQ_SUFFIX_SCALE_OFFSET, prefix);
    const void *found = NULL;
    mq_status status = bind_needed(b, name, GGML_F16, scale_shape, &found);
    matrix->scale_offset = found;
    const uint64_t plane_shape[4] = {1, matrix->tiles, matrix->groups, MQ_TILE_BYTES};
    for (uint32_t e = 0; e < MQ_SLICE_COUNT && status == MQ_OK; e++) {
        (void)snprintf(name, sizeof name, "%s.slice%" PRIu32, prefix, e + 1);
        found = NULL;
        status = e < needed ? bind_needed(b, name, GGML_I8, plane_shape, &found) : bind(b, name, GGML_I8, plane_shape, &found);
        matrix->plane[e] = found;
    }
    return status;
}

static mq_status bind_router(binder *b, uint32_t block, size_t point, uint32_t columns, mq_router *router)
{
    const mq_hparams *hp = &b->model->hparams;
    char name[NAME_SIZE];
    router->linears = ROUTER_LINEARS[point];
    router->columns = columns;
    router->groups = (columns + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE;
    const uint32_t gates = MQ_SLICE_COUNT - 1;
    const uint64_t width = (uint64_t)router->groups * MQ_GROUP_SIZE;
    const struct {
        const char *part;
        uint32_t type;
        uint64_t shape[4];
    } parts[] = {
        {"hidden", GGML_I8, {1, 1, hp->router_hidden, width}},
        {"hidden_scale", GGML_F32, {1, 1, 1, hp->router_hidden}},
        {"hidden_bias", GGML_F32, {1, 1, 1, hp->router_hidden}},
        {"head", GGML_F32, {1, router->linears, gates, hp->router_hidden + 1}},
        {"head_bias", GGML_F32, {1, 1, router->linears, gates}},
        {"threshold", GGML_F32, {1, router->linears, gates, hp->budget_count}},
    };
    enum { PARTS = sizeof parts / sizeof parts[0] };
    const void *found[PARTS] = {NULL};
    mq_status status = MQ_OK;
    for (size_t i = 0; i < PARTS && status == MQ_OK; i++) {
        (void)snprintf(name, sizeof name, "blk.%" PRIu32 ".router_%s.%s", block, ROUTER_NAMES[point], parts[i].part);
        status = bind_needed(b, name, parts[i].type, parts[i].shape, &found[i]);
    }
    router->hidden = found[0];
    router->hidden_scale = found[1];
    router->hidden_bias = found[2];
    router->head = found[3];
    router->head_bias = found[4];
    router->threshold = found[5];
    return status;
}

static mq_status bind_block(binder *b, uint32_t index, mq_block *block)
{
    const mq_hparams *hp = &b->model->hparams;
    const uint32_t width = hp->embedding_length, ff = hp->feed_forward_length;
    const uint32_t q_width = hp->head_count * hp->head_dim, kv_width = hp->head_count_kv * hp->head_dim;
    const uint32_t rows[MQ_LINEARS] = {q_width, kv_width, kv_width, width, ff, ff, width};
    const uint32_t columns[MQ_LINEARS] = {width, width, width, q_width, width, width, ff};
    char name[NAME_SIZE];
    uint32_t windowed = 1;
    mq_status status = mq_hparams_of_block(&b->model->file, MQ_KEY_SLIDING_WINDOW_PATTERN, hp, index, 1, &windowed, b->error);
    block->window = windowed ? hp->sliding_window : 0;
    if (status == MQ_OK) {
        (void)snprintf(name, sizeof name, "blk.%" PRIu32 "." MQ_TENSOR_ATTN_NORM, index);
        status = bind_f32(b, name, width, &block->attn_norm);
    }
    if (status == MQ_OK) {
        (void)snprintf(name, sizeof name, "blk.%" PRIu32 "." MQ_TENSOR_FFN_NORM, index);
        status = bind_f32(b, name, width, &block->ffn_norm);
    }
    for (size_t i = 0; i < MQ_LINEARS && status == MQ_OK; i++) {
        (void)snprintf(name, sizeof name, "blk.%" PRIu32 ".%s", index, LINEAR_NAMES[i]);
        status = bind_matrix(b, name, rows[i], columns[i], 1, &block->linear[i]);
    }
    size_t first = 0;
    for (size_t point = 0; point < MQ_ROUTERS && status == MQ_OK; point++) {
        status = bind_router(b, index, point, columns[first], &block->router[point]);
        first += ROUTER_LINEARS[point];
    }
    return status;
}

static mq_status bind_all(binder *b)
{
    mq_model *model = b->model;
    const mq_hparams *hp = &model->hparams;
    mq_status status = bind_f32(b, MQ_TENSOR_OUTPUT_NORM, hp->embedding_length, &model->output_norm);
    if (status == MQ_OK) {
        status = bind_f32(b, MQ_TENSOR_ROPE, hp->head_dim / 2, &model->inv_freq);
    }
    const int32_t tied = gguf_find_tensor(&model->file, MQ_TENSOR_OUTPUT "." MQ_SUFFIX_SCALE_OFFSET) == NULL;
    const uint32_t embedding_needed =
        tied && hp->output_depth > hp->embedding_depth ? hp->output_depth : hp->embedding_depth;
    if (status == MQ_OK) {
        status = bind_matrix(b, MQ_TENSOR_EMBEDDING, hp->vocab_size, hp->embedding_length, embedding_needed, &model->embedding);
    }
    if (status == MQ_OK && tied) {
        model->output = model->embedding;
    } else if (status == MQ_OK) {
        status = bind_matrix(b, MQ_TENSOR_OUTPUT, hp->vocab_size, hp->embedding_length, hp->output_depth, &model->output);
    }
    for (uint32_t i = 0; i < hp->block_count && status == MQ_OK; i++) {
        status = bind_block(b, i, &model->blocks[i]);
    }
    if (status == MQ_OK && b->bound != model->file.tensor_count) {
        return mq_fail(b->error, MQ_ERR_FORMAT, "%s: expected %zu tensors, found %zu: some belong to no layer",
                       model->file.path, b->bound, model->file.tensor_count);
    }
    model->info.output_bytes = status == MQ_OK && !tied ? mq_matrix_bytes(&model->output, MQ_SLICE_COUNT) : 0;
    return status;
}

static void fill_info(mq_model *model)
{
    const mq_hparams *hp = &model->hparams;
    mq_model_info *info = &model->info;
    info->vocab_size = hp->vocab_size;
    info->context_length = hp->context_length;
    info->embedding_length = hp->embedding_length;
    info->block_count = hp->block_count;
    info->feed_forward_length = hp->feed_forward_length;
    info->head_count = hp->head_count;
    info->head_count_kv = hp->head_count_kv;
    info->head_dim = hp->head_dim;
    info->embedding_depth = hp->embedding_depth;
    info->output_depth = hp->output_depth;
    info->router_hidden = hp->router_hidden;
    info->tensor_count = (uint32_t)model->file.tensor_count;
    info->file_bytes = model->file.size;
    info->expected_bytes = model->file.expected_size;
    info->embedding_bytes = mq_matrix_bytes(&model->embedding, MQ_SLICE_COUNT);
    info->max_depth = MQ_SLICE_COUNT;
    for (uint32_t i = 0; i < hp->block_count; i++) {
        const mq_block *block = &model->blocks[i];
        for (size_t j = 0; j < MQ_LINEARS; j++) {
            const mq_matrix *m = &block->linear[j];
            const size_t plane = (size_t)m->tiles * m->groups * MQ_TILE_BYTES;
            uint32_t depth = 0;
            while (depth < MQ_SLICE_COUNT && m->plane[depth] != NULL) {
                info->slice_bytes[depth++] += plane;
            }
            info->max_depth = depth < info->max_depth ? depth : info->max_depth;
            info->scale_bytes += mq_matrix_bytes(m, 0);
            info->routed_weights += (uint64_t)m->rows * m->columns;
        }
        for (size_t j = 0; j < MQ_ROUTERS; j++) {
            info->router_bytes += mq_router_bytes(&block->router[j], hp);
        }
    }
}

size_t mq_matrix_bytes(const mq_matrix *matrix, uint32_t depth)
{
    const size_t tiles = (size_t)matrix->tiles * matrix->groups;
    return tiles * (2 * MQ_TILE_ROWS * sizeof(uint16_t) + (size_t)depth * MQ_TILE_BYTES);
}

mq_status mq_model_open(const char *path, const mq_model_options *options, mq_model **out, mq_error *error)
{
    const mq_model_options plain = {0};
    options = options == NULL ? &plain : options;
    *out = NULL;
    mq_model *model = mq_alloc(1, sizeof *model);
    const size_t path_size = strlen(path) + 1;
    if (model != NULL) {
        model->path = mq_alloc(path_size, 1);
    }
    if (model == NULL || model->path == NULL) {
        mq_model_close(model);
        return mq_fail(error, MQ_ERR_MEMORY, "%s: cannot allocate the model", path);
    }
    memcpy(model->path, path, path_size);
    mq_status status = mq_mapping_open(model->path, options->no_mmap, &model->mapping, error);
    if (status == MQ_OK) {
        status = gguf_open(model->path, model->mapping.data, model->mapping.size, options->allow_partial, &model->file, error);
    }
    if (status == MQ_OK) {
        status = mq_hparams_read(&model->file, &model->hparams, error);
    }
    if (status == MQ_OK) {
        model->blocks = mq_alloc(model->hparams.block_count, sizeof *model->blocks);
        if (model->blocks == NULL) {
            status = mq_fail(error, MQ_ERR_MEMORY, "%s: cannot allocate %" PRIu32 " blocks", path, model->hparams.block_count);
        }
    }
    if (status == MQ_OK) {
        status = mq_static_order_read(&model->file, model->hparams.block_count, &model->static_order, error);
    }
    if (status == MQ_OK) {
        binder b = {model, error, 0};
        status = bind_all(&b);
    }
    if (status != MQ_OK) {
        mq_model_close(model);
        return status;
    }
    fill_info(model);
    status = mq_device_open(model, options->device, error);
    if (status != MQ_OK) {
        mq_model_close(model);
        return status;
    }
    *out = model;
    return MQ_OK;
}

void mq_model_close(mq_model *model)
{
    if (model == NULL) {
        return;
    }
    mq_device_close(model);
    free(model->static_order);
    free(model->blocks);
    gguf_close(&model->file);
    mq_mapping_close(&model->mapping);
    free(model->path);
    free(model);
}

void mq_model_get_info(const mq_model *model, mq_model_info *info)
{
    *info = model->info;
}

mq_status mq_model_string(const mq_model *model, const char *name, const char **data, size_t *size, mq_error *error)
{
    const gguf_key *key = gguf_find_key(&model->file, name);
    *data = NULL;
    *size = 0;
    if (key == NULL) {
        return MQ_OK;
    }
    if (key->type != GGUF_STRING || key->is_array) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected a string", model->path, name);
    }
    *data = (const char *)key->value;
    *size = (size_t)key->count;
    return MQ_OK;
}

mq_status mq_model_u32(const mq_model *model, const char *name, uint32_t *values, size_t capacity, size_t *count,
                       mq_error *error)
{
    const gguf_key *key = gguf_find_key(&model->file, name);
    *count = 0;
    if (key == NULL) {
        return MQ_OK;
    }
    if (key->type == GGUF_BOOL && !key->is_array) {
        if (capacity > 0) {
            values[0] = key->value[0] != 0;
        }
    } else if (key->type == GGUF_U32) {
        memcpy(values, key->value, sizeof *values * (size_t)(key->count < capacity ? key->count : capacity));
    } else {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected u32 or bool, found type %" PRIu32, model->path, name,
                       key->type);
    }
    *count = (size_t)key->count;
    return MQ_OK;
}
