/* check.c: checksums and values. Opening a file reads its header alone, so that a slice never used is never loaded; this reads
 * everything, when it is asked for. */
#include "check.h"

#include "error.h"
#include "f16.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* CRC-32 as in zlib, eight bytes at a time: table k is for a byte with k more after it. */
enum { STEP = 8, VALUES = 256 };

typedef struct crc_tables {
    uint32_t entry[STEP][VALUES];
} crc_tables;

static void fill_tables(crc_tables *tables)
{
    static const uint32_t POLYNOMIAL = 0xedb88320u;
    for (uint32_t value = 0; value < VALUES; value++) {
        uint32_t crc = value;
        for (int32_t bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ ((crc & 1u) != 0 ? POLYNOMIAL : 0);
        }
        tables->entry[0][value] = crc;
    }
    for (size_t k = 1; k < STEP; k++) {
        for (uint32_t value = 0; value < VALUES; value++) {
            const uint32_t before = tables->entry[k - 1][value];
            tables->entry[k][value] = (before >> 8) ^ tables->entry[0][before & 0xffu];
        }
    }
}

/* Goes on from `crc`, the value of the bytes before; 0 for none. */
static uint32_t crc32_of(const crc_tables *tables, uint32_t crc, const uint8_t *bytes, size_t size)
{
    crc = ~crc;
    for (; size >= STEP; size -= STEP, bytes += STEP) {
        const uint32_t low = crc ^ ((uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24);
        crc = tables->entry[7][low & 0xffu] ^ tables->entry[6][low >> 8 & 0xffu] ^ tables->entry[5][low >> 16 & 0xffu]
              ^ tables->entry[4][low >> 24] ^ tables->entry[3][bytes[4]] ^ tables->entry[2][bytes[5]]
              ^ tables->entry[1][bytes[6]] ^ tables->entry[0][bytes[7]];
    }
    for (; size > 0; size--, bytes++) {
        crc = (crc >> 8) ^ tables->entry[0][(crc ^ *bytes) & 0xffu];
    }
    return ~crc;
}

mq_status mq_checksums_find(const gguf_file *file, const uint8_t **checksums, mq_error *error)
{
    const gguf_key *key = gguf_find_key(file, MQ_KEY_CHECKSUMS);
    *checksums = NULL;
    if (key == NULL) {
        return MQ_OK;
    }
    if (!key->is_array || key->type != GGUF_U32 || key->count != file->tensor_count + 1) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected an array of %zu u32, found %" PRIu64 " of type %" PRIu32,
                       file->path, MQ_KEY_CHECKSUMS, file->tensor_count + 1, key->count, key->type);
    }
    *checksums = key->value;
    return MQ_OK;
}

static uint32_t checksum_at(const uint8_t *checksums, size_t index)
{
    uint32_t value;
    memcpy(&value, checksums + index * sizeof value, sizeof value);
    return value;
}

/* Everything before the first tensor, with its own checksum, the last of the list, as zeros. */
static uint32_t metadata_checksum(const crc_tables *tables, const gguf_file *file, const uint8_t *checksums)
{
    static const uint8_t zeros[sizeof(uint32_t)] = {0};
    const size_t own = (size_t)(checksums - file->data) + file->tensor_count * sizeof(uint32_t), after = own + sizeof zeros;
    uint32_t crc = crc32_of(tables, 0, file->data, own);
    crc = crc32_of(tables, crc, zeros, sizeof zeros);
    return crc32_of(tables, crc, file->data + after, file->data_start - after);
}

static mq_status check_checksum(const mq_model *model, const char *what, uint32_t expected, uint32_t found, mq_error *error)
{
    if (expected != found) {
        return mq_fail(error, MQ_ERR_CORRUPT, "%s: %s: expected checksum %08" PRIx32 ", found %08" PRIx32 ": its bytes are not "
                       "those that were written", model->path, what, expected, found);
    }
    return MQ_OK;
}

static mq_status bad_value(const mq_model *model, const gguf_tensor *tensor, const char *expected, size_t index, double found,
                           mq_error *error)
{
    return mq_fail(error, MQ_ERR_CORRUPT, "%s: tensor '%.*s': expected %s, found %g at element %zu", model->path,
                   (int)tensor->name.size, tensor->name.text, expected, found, index);
}

static bool has_suffix(gguf_name name, const char *suffix)
{
    const size_t size = strlen(suffix);
    return name.size >= size && memcmp(name.text + name.size - size, suffix, size) == 0;
}

/* Norms, rotary frequencies, routers. A threshold falls as the budget grows. */
static mq_status check_f32(const mq_model *model, const gguf_tensor *tensor, mq_error *error)
{
    static const uint32_t EXPONENT = 0x7f800000u;
    const uint8_t *data = model->file.data + tensor->offset;
    const size_t count = tensor->size / sizeof(float), row = (size_t)tensor->shape[MQ_MAX_DIMENSIONS - 1];
    const bool falls = has_suffix(tensor->name, "." MQ_ROUTER_THRESHOLD);
    float before = 0.0f;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        float value;
        memcpy(&bits, data + i * sizeof bits, sizeof bits);
        memcpy(&value, &bits, sizeof value);
        if ((bits & EXPONENT) == EXPONENT) {
            return bad_value(model, tensor, "finite numbers", i, (double)value, error);
        }
        if (falls && i % row > 0 && value > before) {
            return bad_value(model, tensor, "thresholds that never rise with the budget", i, (double)value, error);
        }
        before = value;
    }
    return MQ_OK;
}

/* f16 [tiles][groups][2][16]: scales, then offsets. */
static mq_status check_scales(const mq_model *model, const gguf_tensor *tensor, mq_error *error)
{
    enum { EXPONENT = 0x7c00, SIGN = 0x8000 };
    const uint8_t *data = model->file.data + tensor->offset;
    for (size_t i = 0; i < tensor->size / sizeof(uint16_t); i++) {
        uint16_t half;
        memcpy(&half, data + i * sizeof half, sizeof half);
        if ((half & EXPONENT) == EXPONENT) {
            return bad_value(model, tensor, "finite numbers", i, (double)mq_f16_to_f32(half), error);
        }
        if (half > SIGN && i / MQ_TILE_ROWS % 2 == 0) {
            return bad_value(model, tensor, "scales of at least 0", i, (double)mq_f16_to_f32(half), error);
        }
    }
    return MQ_OK;
}

static mq_status check_tensor(const mq_model *model, const crc_tables *tables, const gguf_tensor *tensor, mq_error *error)
{
    mq_status status = MQ_OK;
    if (tensor->present && model->checksums != NULL) {
        const uint32_t found = crc32_of(tables, 0, model->file.data + tensor->offset, tensor->size);
        char what[sizeof "tensor ''" + MQ_MAX_TENSOR_NAME];
        (void)snprintf(what, sizeof what, "tensor '%.*s'", (int)tensor->name.size, tensor->name.text);
        status = check_checksum(model, what, checksum_at(model->checksums, tensor->index), found, error);
    }
    if (status == MQ_OK && tensor->present && tensor->type == GGML_F32) {
        status = check_f32(model, tensor, error);
    }
    if (status == MQ_OK && tensor->present && tensor->type == GGML_F16) {
        status = check_scales(model, tensor, error);
    }
    return status;
}

static mq_status check_one(const mq_model *model, const crc_tables *tables, size_t index, mq_error *error)
{
    const gguf_file *file = &model->file;
    if (index < file->tensor_count) {
        return check_tensor(model, tables, &file->tensors[index], error);
    }
    if (model->checksums == NULL) {
        return MQ_OK;
    }
    const uint32_t expected = checksum_at(model->checksums, file->tensor_count);
    return check_checksum(model, "metadata", expected, metadata_checksum(tables, file, model->checksums), error);
}

mq_status mq_model_check(const mq_model *model, size_t index, mq_error *error)
{
    if (index > model->file.tensor_count) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "check: expected at most %zu, the number of tensors, found %zu",
                       model->file.tensor_count, index);
    }
    crc_tables tables;
    fill_tables(&tables);
    return check_one(model, &tables, index, error);
}

mq_status mq_check_all(const mq_model *model, mq_error *error)
{
    crc_tables tables;
    fill_tables(&tables);
    mq_status status = MQ_OK;
    for (size_t i = 0; i <= model->file.tensor_count && status == MQ_OK; i++) {
        status = check_one(model, &tables, i, error);
    }
    return status;
}
