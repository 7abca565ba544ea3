/* cursor.c: every count is compared with the bytes that remain before it is used. */
#include "cursor.h"

#include "error.h"

#include <inttypes.h>
#include <string.h>

mq_status mq_truncated(const mq_cursor *at, const char *what, uint64_t need)
{
    return mq_fail(at->error, MQ_ERR_TRUNCATED, "%s: file ends in its header: %s at byte %zu needs %" PRIu64
                   " bytes, %zu remain", at->path, what, at->offset, need, at->size - at->offset);
}

mq_status mq_take(mq_cursor *at, uint64_t count, const char *what, const uint8_t **bytes)
{
    if (count > at->size - at->offset) {
        return mq_truncated(at, what, count);
    }
    *bytes = at->data + at->offset;
    at->offset += (size_t)count;
    return MQ_OK;
}

static mq_status take_value(mq_cursor *at, const char *what, void *value, size_t size)
{
    const uint8_t *bytes = NULL;
    const mq_status status = mq_take(at, size, what, &bytes);
    if (status == MQ_OK) {
        memcpy(value, bytes, size);
    }
    return status;
}

mq_status mq_take_u32(mq_cursor *at, const char *what, uint32_t *value)
{
    return take_value(at, what, value, sizeof *value);
}

mq_status mq_take_u64(mq_cursor *at, const char *what, uint64_t *value)
{
    return take_value(at, what, value, sizeof *value);
}

mq_status mq_take_name(mq_cursor *at, const char *what, size_t most, const char **name, size_t *size)
{
    uint64_t count = 0;
    mq_status status = mq_take_u64(at, what, &count);
    if (status != MQ_OK) {
        return status;
    }
    if (count == 0 || count > most) {
        return mq_fail(at->error, MQ_ERR_FORMAT, "%s: %s at byte %zu: expected 1 to %zu bytes, found %" PRIu64, at->path, what,
                       at->offset - sizeof count, most, count);
    }
    const uint8_t *bytes = NULL;
    status = mq_take(at, count, what, &bytes);
    for (size_t i = 0; i < count && status == MQ_OK; i++) {
        if (bytes[i] < '!' || bytes[i] > '~') { /* so that a name can be shown, and ends where it seems to end */
            status = mq_fail(at->error, MQ_ERR_FORMAT, "%s: %s: expected printable ASCII, found byte 0x%02x at byte %zu", at->path,
                             what, bytes[i], at->offset - (size_t)count + i);
        }
    }
    *name = (const char *)bytes;
    *size = (size_t)count;
    return status;
}
