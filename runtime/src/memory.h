/* memory.h: checked size arithmetic and aligned allocation. */
#ifndef MQ_MEMORY_H
#define MQ_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* True when the result fits; *out is untouched otherwise. */
static inline bool mq_add(size_t a, size_t b, size_t *out)
{
    if (a > SIZE_MAX - b) {
        return false;
    }
    *out = a + b;
    return true;
}

static inline bool mq_mul(size_t a, size_t b, size_t *out)
{
    if (b != 0 && a > SIZE_MAX / b) {
        return false;
    }
    *out = a * b;
    return true;
}

/* count·size zeroed bytes on a cache line of their own; NULL when they do not fit. Free with free(). */
void *mq_alloc(size_t count, size_t size);

#endif
