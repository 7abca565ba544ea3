/* cache.h: keys and values of past positions in the order in which attention reads them (attend in kernels.h).
 *
 * A head is one kv head of one block, counted through the model: keys f16 [head][positions / 16][head_dim][16], values
 * f16 [head][positions][head_dim padded to 16]. The first 16·k positions of a head's keys are one piece of memory.
 */
#ifndef MQ_CACHE_H
#define MQ_CACHE_H

#include "kernels.h"
#include "file_limits.h"

enum { MQ_KEY_POSITIONS = 16 };

typedef struct mq_cache {
    uint16_t *keys, *values; /* zero where nothing was put */
    size_t positions;        /* a multiple of MQ_KEY_POSITIONS */
    size_t head_dim;
} mq_cache;

/* Of a position that is a multiple of MQ_KEY_POSITIONS. */
static inline uint16_t *mq_cache_keys(const mq_cache *cache, size_t head, size_t position)
{
    return cache->keys + (head * cache->positions + position) * cache->head_dim;
}

static inline uint16_t *mq_cache_values(const mq_cache *cache, size_t head, size_t position)
{
    return cache->values + (head * cache->positions + position) * mq_padded_dim(cache->head_dim);
}

/* The i-th element of one position's key is at mq_cache_key(...)[i · MQ_KEY_POSITIONS]. */
static inline uint16_t *mq_cache_key(const mq_cache *cache, size_t head, size_t position)
{
    return mq_cache_keys(cache, head, position / MQ_KEY_POSITIONS * MQ_KEY_POSITIONS) + position % MQ_KEY_POSITIONS;
}

#endif
