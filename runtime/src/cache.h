/* cache.h: keys and values of past positions in the order in which attention reads them (attend in kernels.h).
 *
 * Every block has a cache of its own, for its kv heads: keys f16 [head][slots / 16][head_dim][16], values f16
 * [head][slots][head_dim padded to 16]. The first 16·k slots of a head's keys are one piece of memory.
 *
 * Position p lies in slot p % slots. A block that sees everything has a slot for each position of the context. One with a
 * sliding window has a ring: room for the window and a batch, in whole chunks of attention, so that no chunk lies across
 * the ring's end.
 */
#ifndef MQ_CACHE_H
#define MQ_CACHE_H

#include "definition.h"
#include "kernels.h"

enum { MQ_MAX_HEAD_DIM = 1024, MQ_KEY_POSITIONS = 16 };

typedef struct mq_cache {
    uint16_t *keys, *values; /* zero where nothing was put */
    size_t slots;            /* a multiple of MQ_KEY_POSITIONS */
    size_t head_dim;
} mq_cache;

/* window: positions that a token sees, its own counted; 0: all. */
static inline size_t mq_cache_slots(uint32_t window, uint32_t n_ctx, uint32_t n_batch)
{
    const size_t all = ((size_t)n_ctx + MQ_KEY_POSITIONS - 1) / MQ_KEY_POSITIONS * MQ_KEY_POSITIONS;
    if (window == 0 || window >= all || n_batch >= all - window) {
        return all;
    }
    const size_t ring = ((size_t)window + n_batch + MQ_ATTENTION_CHUNK - 1) / MQ_ATTENTION_CHUNK * MQ_ATTENTION_CHUNK;
    return ring < all ? ring : all;
}

/* Of a position that is a multiple of MQ_KEY_POSITIONS. */
static inline uint16_t *mq_cache_keys(const mq_cache *cache, size_t head, size_t position)
{
    return cache->keys + (head * cache->slots + position % cache->slots) * cache->head_dim;
}

static inline uint16_t *mq_cache_values(const mq_cache *cache, size_t head, size_t position)
{
    return cache->values + (head * cache->slots + position % cache->slots) * mq_padded_dim(cache->head_dim);
}

/* The i-th element of one position's key is at mq_cache_key(...)[i · MQ_KEY_POSITIONS]. */
static inline uint16_t *mq_cache_key(const mq_cache *cache, size_t head, size_t position)
{
    return mq_cache_keys(cache, head, position / MQ_KEY_POSITIONS * MQ_KEY_POSITIONS) + position % MQ_KEY_POSITIONS;
}

#endif
