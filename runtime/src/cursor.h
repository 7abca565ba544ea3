/* cursor.h: reading the header of a file front to back, never past its end. */
#ifndef MQ_CURSOR_H
#define MQ_CURSOR_H

#include "mobiquant.h"

typedef struct mq_cursor {
    const char *path; /* for messages */
    const uint8_t *data;
    size_t size, offset;
    mq_error *error;
} mq_cursor;

/* Each take advances the cursor, or fails with MQ_ERR_TRUNCATED and a message that says what was wanted. */
mq_status mq_take(mq_cursor *at, uint64_t count, const char *what, const uint8_t **bytes);
mq_status mq_take_u32(mq_cursor *at, const char *what, uint32_t *value);
mq_status mq_take_u64(mq_cursor *at, const char *what, uint64_t *value);
/* A length, 1 to `most`, and so many bytes of printable ASCII, not 0-terminated; MQ_ERR_FORMAT for anything else. */
mq_status mq_take_name(mq_cursor *at, const char *what, size_t most, const char **name, size_t *size);
/* The error of a file that ends before `need` more bytes. */
mq_status mq_truncated(const mq_cursor *at, const char *what, uint64_t need);

#endif
