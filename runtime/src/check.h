/* check.h: whether the bytes of a file are those that were written, and numbers that a model can have. */
#ifndef MQ_CHECK_H
#define MQ_CHECK_H

#include "model.h"

/* The checksums of the file (docs/format.md, Checksums), unaligned; NULL when it has none. MQ_ERR_FORMAT for another type or number. */
mq_status mq_checksums_find(const gguf_file *file, const uint8_t **checksums, mq_error *error);

/* Every tensor present and the metadata, up to the first that is wrong. */
mq_status mq_check_all(const mq_model *model, mq_error *error);

#endif
