/* gguf.c: reading the container. Every count and size is compared with the bytes that remain before it is used, and every
 * sum is checked; an index is built once, sorted by name. */
#include "gguf.h"

#include "cursor.h"
#include "error.h"
#include "keys.h"
#include "file_limits.h"
#include "memory.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { MIN_KEY_BYTES = 13, MIN_TENSOR_BYTES = 32 }; /* of an entry in the header, so that a count can be compared with the bytes left */

/* Bytes of one value of a fixed-size type; 0 for strings, arrays and unknown types. */
static size_t value_size(uint32_t type)
{
    static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < sizeof sizes ? sizes[type] : 0;
}

/* `count` values of `size` bytes each. */
static mq_status take_value_bytes(mq_cursor *at, gguf_key *key, uint64_t count, size_t size)
{
    const size_t remain = at->size - at->offset;
    if (count > remain / size) {
        return mq_fail(at->error, MQ_ERR_TRUNCATED, "%s: key '%.*s': the file ends in its value: expected %" PRIu64 " values of %zu "
                       "bytes, found %zu bytes", at->path, (int)key->name.size, key->name.text, count, size, remain);
    }
    return mq_take(at, count * size, "value of a key", &key->value);
}

static mq_status take_string_value(mq_cursor *at, gguf_key *key)
{
    mq_status status = mq_take_u64(at, "length of a string value", &key->count);
    if (status == MQ_OK && key->count > MQ_MAX_STRING) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: key '%.*s': expected at most %d bytes in a string, found %" PRIu64, at->path,
                       (int)key->name.size, key->name.text, MQ_MAX_STRING, key->count);
    }
    if (status == MQ_OK) {
        status = take_value_bytes(at, key, key->count, 1);
    }
    return status;
}

static mq_status take_array_value(mq_cursor *at, gguf_key *key)
{
    key->is_array = 1;
    mq_status status = mq_take_u32(at, "element type of an array", &key->type);
    if (status == MQ_OK) {
        status = mq_take_u64(at, "length of an array", &key->count);
    }
    if (status != MQ_OK) {
        return status;
    }
    if (key->count > MQ_MAX_ARRAY) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: key '%.*s': expected at most %d elements in an array, found %" PRIu64,
                       at->path, (int)key->name.size, key->name.text, MQ_MAX_ARRAY, key->count);
    }
    const size_t size = value_size(key->type);
    if (size != 0) {
        return take_value_bytes(at, key, key->count, size);
    }
    if (key->type != GGUF_STRING) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: key '%.*s': expected a flat array, found elements of type %" PRIu32,
                       at->path, (int)key->name.size, key->name.text, key->type);
    }
    key->value = at->data + at->offset;
    for (uint64_t i = 0; i < key->count; i++) { /* each takes 8 bytes at least, so the file bounds the loop */
        gguf_key element = {.name = key->name};
        status = take_string_value(at, &element);
        if (status != MQ_OK) {
            return status;
        }
    }
    return MQ_OK;
}

static mq_status take_key(mq_cursor *at, gguf_key *key)
{
    mq_status status = mq_take_name(at, "name of a key", MQ_MAX_KEY_NAME, &key->name.text, &key->name.size);
    if (status == MQ_OK) {
        status = mq_take_u32(at, "type of a key", &key->type);
    }
    if (status != MQ_OK) {
        return status;
    }
    key->count = 1;
    if (key->type == GGUF_STRING) {
        return take_string_value(at, key);
    }
    if (key->type == GGUF_ARRAY) {
        return take_array_value(at, key);
    }
    const size_t size = value_size(key->type);
    if (size == 0) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: key '%.*s': expected a value type from 0 to 12, found %" PRIu32,
                       at->path, (int)key->name.size, key->name.text, key->type);
    }
    return take_value_bytes(at, key, 1, size);
}

static mq_status take_tensor(mq_cursor *at, gguf_tensor *tensor, uint64_t *relative_offset)
{
    const char *path = at->path;
    mq_status status = mq_take_name(at, "name of a tensor", MQ_MAX_TENSOR_NAME, &tensor->name.text, &tensor->name.size);
    uint32_t dims = 0;
    if (status == MQ_OK) {
        status = mq_take_u32(at, "number of dimensions", &dims);
    }
    if (status != MQ_OK) {
        return status;
    }
    const int name_size = (int)tensor->name.size;
    if (dims < 1 || dims > MQ_MAX_DIMENSIONS) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: tensor '%.*s': expected 1 to %d dimensions, found %" PRIu32, path,
                       name_size, tensor->name.text, MQ_MAX_DIMENSIONS, dims);
    }
    size_t count = 1;
    for (size_t i = 0; i < MQ_MAX_DIMENSIONS; i++) {
        tensor->shape[i] = 1;
    }
    for (size_t i = 0; i < dims; i++) { /* the file lists the fastest dimension first */
        uint64_t length = 0;
        status = mq_take_u64(at, "dimension", &length);
        if (status != MQ_OK) {
            return status;
        }
        if (length == 0 || length > SIZE_MAX || !mq_mul(count, (size_t)length, &count)) {
            return mq_fail(at->error, MQ_ERR_FORMAT, "%s: tensor '%.*s': dimension %zu is %" PRIu64
                           ": the size is zero or wraps", path, name_size, tensor->name.text, i, length);
        }
        tensor->shape[MQ_MAX_DIMENSIONS - 1 - i] = length;
    }
    status = mq_take_u32(at, "type of a tensor", &tensor->type);
    if (status == MQ_OK) {
        status = mq_take_u64(at, "offset of a tensor", relative_offset);
    }
    if (status != MQ_OK) {
        return status;
    }
    const size_t width = tensor->type == GGML_F32 ? 4 : tensor->type == GGML_F16 ? 2 : tensor->type == GGML_I8 ? 1 : 0;
    if (width == 0) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: tensor '%.*s': expected type F32, F16 or I8, found type %" PRIu32, path,
                       name_size, tensor->name.text, tensor->type);
    }
    if (!mq_mul(count, width, &tensor->size)) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: tensor '%.*s': its size wraps", path, name_size, tensor->name.text);
    }
    return MQ_OK;
}

/* Keys and tensors both begin with their gguf_name. */
static int compare_names(const void *a, const void *b)
{
    const gguf_name *x = a, *y = b;
    const int order = memcmp(x->text, y->text, x->size < y->size ? x->size : y->size);
    return order != 0 ? order : (x->size > y->size) - (x->size < y->size);
}

/* Sort `count` keys or tensors of `width` bytes by name, and refuse doubles. */
static mq_status sort_by_name(const gguf_file *file, const char *what, void *entries, size_t count, size_t width, mq_error *error)
{
    if (count > 0) {
        qsort(entries, count, width, compare_names);
    }
    for (size_t i = 1; i < count; i++) {
        const gguf_name *name = (const void *)((const char *)entries + i * width);
        if (compare_names((const char *)entries + (i - 1) * width, name) == 0) {
            return mq_fail(error, MQ_ERR_FORMAT, "%s: %s '%.*s' appears twice", file->path, what, (int)name->size, name->text);
        }
    }
    return MQ_OK;
}

/* Tensors lie one after another in the order of their infos, each at the next multiple of the alignment. */
static mq_status place_tensor(const mq_cursor *at, const gguf_file *file, gguf_tensor *tensor, uint64_t relative_offset, size_t data_start,
                              int32_t allow_partial, size_t *end)
{
    size_t start = 0;
    if (!mq_add(*end, MQ_ALIGNMENT - 1, &start)) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: tensor '%.*s': its place wraps", file->path, (int)tensor->name.size,
                       tensor->name.text);
    }
    start -= start % MQ_ALIGNMENT;
    if (relative_offset != start - data_start) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: tensor '%.*s': expected offset %zu (no gap, no overlap), found %" PRIu64,
                       file->path, (int)tensor->name.size, tensor->name.text, start - data_start, relative_offset);
    }
    if (!mq_add(start, tensor->size, end)) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: tensor '%.*s': its end wraps", file->path, (int)tensor->name.size,
                       tensor->name.text);
    }
    tensor->offset = start;
    tensor->present = *end <= file->size;
    if (!tensor->present && !allow_partial) {
        return mq_fail(at->error, MQ_ERR_TRUNCATED, "%s: tensor '%.*s' ends at byte %zu, the file at %zu; a file cut after its "
                       "last base slice opens as a partial model on request", file->path, (int)tensor->name.size, tensor->name.text,
                       *end, file->size);
    }
    return MQ_OK;
}

/* The architecture comes first, so that another program's file is refused by its name and not by a detail. */
static mq_status check_identity(const gguf_file *file, mq_error *error)
{
    uint32_t alignment = 0;
    mq_status status = gguf_expect_string(file, MQ_KEY_ARCHITECTURE, MQ_ARCHITECTURE, MQ_ERR_UNSUPPORTED, error);
    if (status == MQ_OK) {
        status = gguf_u32(file, MQ_KEY_ALIGNMENT, &alignment, error);
    }
    if (status == MQ_OK && alignment != MQ_ALIGNMENT) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected %d, found %" PRIu32, file->path, MQ_KEY_ALIGNMENT,
                       MQ_ALIGNMENT, alignment);
    }
    return status;
}

/* Of entries that take at least `least` bytes each. */
static mq_status check_count(const mq_cursor *at, const char *what, uint64_t count, uint64_t most, uint64_t least)
{
    const size_t remain = at->size - at->offset;
    if (count > most) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: header claims %" PRIu64 " %s: expected at most %" PRIu64, at->path, count, what,
                       most);
    }
    if (count * least > remain) {
        return mq_fail(at->error, MQ_ERR_TRUNCATED, "%s: file ends in its header: %" PRIu64 " %s need at least %" PRIu64 " bytes, "
                       "%zu remain", at->path, count, what, count * least, remain);
    }
    return MQ_OK;
}

static mq_status read_header(mq_cursor *at, uint64_t *tensor_count, uint64_t *key_count)
{
    const char *path = at->path;
    const uint8_t *magic = NULL;
    uint32_t version = 0;
    if (at->size < 4 || memcmp(at->data, "GGUF", 4) != 0) {
        return mq_fail(at->error, MQ_ERR_NOT_GGUF, "%s: not a GGUF file: expected the first bytes 'GGUF'", path);
    }
    mq_status status = mq_take(at, 4, "magic", &magic);
    if (status == MQ_OK) {
        status = mq_take_u32(at, "version", &version);
    }
    if (status == MQ_OK && version != 3) {
        return mq_fail(at->error, MQ_ERR_NOT_GGUF, "%s: expected GGUF version 3, found %" PRIu32, path, version);
    }
    if (status == MQ_OK) {
        status = mq_take_u64(at, "number of tensors", tensor_count);
    }
    if (status == MQ_OK) {
        status = mq_take_u64(at, "number of keys", key_count);
    }
    if (status != MQ_OK) {
        return status;
    }
    status = check_count(at, "keys", *key_count, MQ_MAX_KEYS, MIN_KEY_BYTES);
    return status == MQ_OK ? check_count(at, "tensors", *tensor_count, MQ_MAX_TENSORS, MIN_TENSOR_BYTES) : status;
}

static mq_status read_tensors(mq_cursor *at, gguf_file *file, int32_t allow_partial, uint64_t *relative_offsets)
{
    for (size_t i = 0; i < file->tensor_count; i++) {
        file->tensors[i].index = (uint32_t)i;
        const mq_status status = take_tensor(at, &file->tensors[i], &relative_offsets[i]);
        if (status != MQ_OK) {
            return status;
        }
    }
    size_t data_start = 0;
    if (!mq_add(at->offset, MQ_ALIGNMENT - 1, &data_start)) {
        return mq_truncated(at, "tensor data", 1);
    }
    data_start -= data_start % MQ_ALIGNMENT;
    file->data_start = data_start;
    size_t end = data_start;
    for (size_t i = 0; i < file->tensor_count; i++) {
        const mq_status status = place_tensor(at, file, &file->tensors[i], relative_offsets[i], data_start, allow_partial, &end);
        if (status != MQ_OK) {
            return status;
        }
    }
    size_t padded_end = 0;
    if (!mq_add(end, MQ_ALIGNMENT - 1, &padded_end)) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: the file's end wraps", file->path);
    }
    padded_end -= padded_end % MQ_ALIGNMENT; /* writers may pad the last tensor too */
    file->expected_size = file->size > end ? padded_end : end;
    if (file->size > end && file->size != padded_end) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: expected %zu bytes, found %zu: bytes after the last tensor", file->path,
                       padded_end, file->size);
    }
    return MQ_OK;
}

mq_status gguf_open(const char *path, const uint8_t *data, size_t size, int32_t allow_partial, gguf_file *file,
                    mq_error *error)
{
    *file = (gguf_file){.path = path, .data = data, .size = size};
    mq_cursor at = {.path = path, .data = data, .size = size, .error = error};
    uint64_t tensor_count = 0, key_count = 0;
    uint64_t *relative_offsets = NULL;
    mq_status status = read_header(&at, &tensor_count, &key_count);
    if (status != MQ_OK) {
        goto done;
    }
    file->keys = mq_alloc((size_t)key_count, sizeof *file->keys);
    file->tensors = mq_alloc((size_t)tensor_count, sizeof *file->tensors);
    relative_offsets = mq_alloc((size_t)tensor_count, sizeof *relative_offsets);
    if (file->keys == NULL || file->tensors == NULL || relative_offsets == NULL) {
        status = mq_fail(error, MQ_ERR_MEMORY, "%s: cannot allocate the index of the file", path);
        goto done;
    }
    file->key_count = (size_t)key_count;
    file->tensor_count = (size_t)tensor_count;
    for (size_t i = 0; i < file->key_count && status == MQ_OK; i++) {
        status = take_key(&at, &file->keys[i]);
    }
    if (status == MQ_OK) {
        status = sort_by_name(file, "key", file->keys, file->key_count, sizeof *file->keys, error);
    }
    if (status == MQ_OK) {
        status = check_identity(file, error);
    }
    if (status == MQ_OK) {
        status = read_tensors(&at, file, allow_partial, relative_offsets);
    }
    if (status == MQ_OK) {
        status = sort_by_name(file, "tensor", file->tensors, file->tensor_count, sizeof *file->tensors, error);
    }
done:
    free(relative_offsets);
    if (status != MQ_OK) {
        gguf_close(file);
    }
    return status;
}

void gguf_close(gguf_file *file)
{
    free(file->keys);
    free(file->tensors);
    *file = (gguf_file){0};
}

const gguf_key *gguf_find_key(const gguf_file *file, const char *name)
{
    const gguf_name wanted = {name, strlen(name)};
    return bsearch(&wanted, file->keys, file->key_count, sizeof *file->keys, compare_names);
}

const gguf_tensor *gguf_find_tensor(const gguf_file *file, const char *name)
{
    const gguf_name wanted = {name, strlen(name)};
    return bsearch(&wanted, file->tensors, file->tensor_count, sizeof *file->tensors, compare_names);
}
