/* base.h: what the fuzz targets share: the small file inside the program, and an input read piece by piece. */
#ifndef MQ_FUZZ_BASE_H
#define MQ_FUZZ_BASE_H

#include "../c/harness.h"

/* The file that tests/c/small.py writes, put in by the assembler. */
extern const uint8_t fuzz_base[], fuzz_base_end[];

/* What is left of an input; zeros once it is used up. */
typedef struct fuzz_input {
    const uint8_t *data;
    size_t size;
} fuzz_input;

static inline uint64_t fuzz_take(fuzz_input *in, size_t bytes)
{
    uint64_t value = 0;
    for (size_t i = 0; i < bytes && in->size > 0; i++, in->data++, in->size--) {
        value |= (uint64_t)*in->data << (8 * i);
    }
    return value;
}

/* A number near a power of two, where sizes wrap and limits lie: one byte for the power, one for the distance. */
static inline uint64_t fuzz_take_edge(fuzz_input *in)
{
    const uint64_t power = (uint64_t)1 << (fuzz_take(in, 1) % 64);
    return power + (uint64_t)(int64_t)(int8_t)fuzz_take(in, 1);
}

#endif
