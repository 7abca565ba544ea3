/* mapping.h: the bytes of a file, mapped or read. */
#ifndef MQ_MAPPING_H
#define MQ_MAPPING_H

#include "mobiquant.h"

typedef struct mq_mapping {
    const uint8_t *data; /* 64-byte aligned */
    size_t size;
    int32_t mapped;      /* 1: munmap on close, 0: free */
} mq_mapping;

mq_status mq_mapping_open(const char *path, int32_t no_mmap, mq_mapping *mapping, mq_error *error);
void mq_mapping_close(mq_mapping *mapping); /* a zeroed mapping is allowed */

#endif
