/* memory.c: the one allocator of the library. */
#include "memory.h"

#include <stdlib.h>
#include <string.h>

enum { CACHE_LINE = 64 };

void *mq_alloc(size_t count, size_t size)
{
    size_t bytes = 0;
    if (!mq_mul(count, size, &bytes) || !mq_add(bytes, 2 * CACHE_LINE, &bytes)) {
        return NULL;
    }
    bytes -= bytes % CACHE_LINE; /* aligned_alloc takes whole lines; one more keeps neighbours apart */
    void *memory = aligned_alloc(CACHE_LINE, bytes);
    if (memory != NULL) {
        memset(memory, 0, bytes);
    }
    return memory;
}
