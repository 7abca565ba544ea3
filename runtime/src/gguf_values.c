/* gguf_values.c: values of required keys of an opened file, each of the type that is asked for. */
#include "gguf.h"

#include "error.h"
#include "keys.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static mq_status find_typed(const gguf_file *file, const char *name, uint32_t type, const char *type_name,
                            const gguf_key **key, mq_error *error)
{
    *key = gguf_find_key(file, name);
    if (*key == NULL) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s' is missing", file->path, name);
    }
    if ((*key)->type != type || (*key)->is_array) {
        return mq_fail(error, MQ_ERR_FORMAT, "%s: key '%s': expected %s, found %s of type %" PRIu32, file->path, name,
                       type_name, (*key)->is_array ? "an array" : "a value", (*key)->type);
    }
    return MQ_OK;
}

mq_status gguf_u32(const gguf_file *file, const char *name, uint32_t *value, mq_error *error)
{
    const gguf_key *key = NULL;
    const mq_status status = find_typed(file, name, GGUF_U32, "u32", &key, error);
    if (status == MQ_OK) {
        memcpy(value, key->value, sizeof *value);
    }
    return status;
}

mq_status gguf_f32(const gguf_file *file, const char *name, float *value, mq_error *error)
{
    const gguf_key *key = NULL;
    const mq_status status = find_typed(file, name, GGUF_F32, "f32", &key, error);
    if (status == MQ_OK) {
        memcpy(value, key->value, sizeof *value);
    }
    return status;
}

mq_status gguf_expect_string(const gguf_file *file, const char *name, const char *expected, mq_status wrong,
                             mq_error *error)
{
    const gguf_key *key = NULL;
    const mq_status status = find_typed(file, name, GGUF_STRING, "a string", &key, error);
    if (status != MQ_OK) {
        return status;
    }
    if (key->count != strlen(expected) || memcmp(key->value, expected, (size_t)key->count) != 0) {
        const int shown = key->count < 64 ? (int)key->count : 64;
        return mq_fail(error, wrong, "%s: key '%s': expected '%s', found '%.*s'", file->path, name, expected, shown,
                       (const char *)key->value);
    }
    return MQ_OK;
}

mq_status gguf_choice(const gguf_file *file, const char *name, const char *const *choices, size_t count, uint32_t *index,
                      mq_error *error)
{
    const gguf_key *key = NULL;
    const mq_status status = find_typed(file, name, GGUF_STRING, "a string", &key, error);
    if (status != MQ_OK) {
        return status;
    }
    char list[256] = "";
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        const size_t size = strlen(choices[i]);
        if (key->count == size && memcmp(key->value, choices[i], size) == 0) {
            *index = (uint32_t)i;
            return MQ_OK;
        }
        const int written = snprintf(list + used, sizeof list - used, "%s%s", i > 0 ? ", " : "", choices[i]);
        used = written > 0 && (size_t)written < sizeof list - used ? used + (size_t)written : used;
    }
    const int shown = key->count < 64 ? (int)key->count : 64;
    return mq_fail(error, MQ_ERR_UNSUPPORTED, "%s: key '%s': expected one of %s, found '%.*s'", file->path, name, list, shown,
                   (const char *)key->value);
}
