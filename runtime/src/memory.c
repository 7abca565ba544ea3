/* memory.c: the one allocator of the library. */
#include "memory.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
#define MQ_SEES_NO_MADVISE /* it would take those pages for uninitialised */
#endif
#endif

#if defined(__linux__) && !defined(MQ_SEES_NO_MADVISE)
#include <sys/mman.h>
#include <unistd.h>
#define MQ_LAZY_ZEROES 1
#endif

enum { CACHE_LINE = 64, LARGE = 1 << 20 };

/* Zeroes that cost memory only where they are touched, as most of a long context's cache never is. */
static void zero(uint8_t *memory, size_t bytes)
{
#ifdef MQ_LAZY_ZEROES
    const long page = sysconf(_SC_PAGESIZE);
    if (bytes >= LARGE && page > 0) {
        const size_t size = (size_t)page, first = (size - (uintptr_t)memory % size) % size, whole = (bytes - first) / size * size;
        /* Private pages that are given back read as zeroes afterwards: Linux promises that, other systems do not. */
        if (madvise(memory + first, whole, MADV_DONTNEED) == 0) {
            memset(memory, 0, first);
            memset(memory + first + whole, 0, bytes - first - whole);
            return;
        }
    }
#endif
    memset(memory, 0, bytes);
}

void *mq_alloc(size_t count, size_t size)
{
    size_t bytes = 0;
    if (!mq_mul(count, size, &bytes) || !mq_add(bytes, 2 * CACHE_LINE, &bytes)) {
        return NULL;
    }
    bytes -= bytes % CACHE_LINE; /* aligned_alloc takes whole lines; one more keeps neighbours apart */
    void *memory = aligned_alloc(CACHE_LINE, bytes);
    if (memory != NULL) {
        zero(memory, bytes);
    }
    return memory;
}
