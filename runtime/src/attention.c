/* attention.c: which thread attends to what. The cache is walked in chunks; a chunk's part of the softmax is computed by the
 * `attend` kernel and joined to that of the chunks before it, always in ascending order, so that neither the number of
 * threads nor the number of tokens computed together changes a bit.
 *
 * Of one token every span of chunks is an item of the pool, and the parts are joined after it. Of more tokens a few of them
 * with one kv head are an item, and join their own parts.
 */
#include "attention.h"

#include "definition.h"

#include <string.h>

enum { CHUNKS_PER_ITEM = 4 };

typedef struct attention {
    mq_session *session;
    const mq_hparams *hparams;
    const mq_cache *cache; /* of the block */
    size_t window;         /* of the block; 0: none */
    size_t n, end;         /* tokens; positions once they are in the cache */
} attention;

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* Item: tokens whose positions share MQ_KEY_POSITIONS, so that no two threads write to one cache line. */
static void store_item(void *argument, size_t item, uint32_t thread)
{
    (void)thread;
    const attention *a = argument;
    mq_session *s = a->session;
    const mq_hparams *hp = a->hparams;
    const size_t dim = hp->head_dim, aligned = (s->position / MQ_KEY_POSITIONS + item) * MQ_KEY_POSITIONS;
    const size_t last = smaller(aligned + MQ_KEY_POSITIONS, a->end);
    for (size_t position = aligned > s->position ? aligned : s->position; position < last; position++) {
        const size_t token = position - s->position;
        const float *cosine = s->cosine + position * (dim / 2), *sine = s->sine + position * (dim / 2);
        for (size_t h = 0; h < hp->head_count; h++) {
            s->kernels->rope(s->batch.q + (token * hp->head_count + h) * dim, cosine, sine, dim);
        }
        for (size_t h = 0; h < hp->head_count_kv; h++) {
            const size_t at = (token * hp->head_count_kv + h) * dim;
            s->kernels->rope(s->batch.k + at, cosine, sine, dim);
            mq_cache_put(a->cache, s->kernels, h, position, s->batch.k + at, s->batch.v + at);
        }
    }
}

/* The query heads of kv head `head`, tokens first .. first + count − 1. */
static mq_queries queries_of(const attention *a, size_t head, size_t first, size_t count)
{
    const mq_hparams *hp = a->hparams;
    const size_t shared = hp->head_count / hp->head_count_kv, stride = (size_t)hp->head_count * hp->head_dim;
    return (mq_queries){.query = a->session->batch.q + first * stride + head * shared * hp->head_dim, .tokens = count,
                        .token_stride = stride, .heads = shared, .head_dim = hp->head_dim,
                        .scale = a->session->attention_scale, .window = a->window};
}

/* The first position that a token at `position` sees. */
static size_t oldest_seen(const attention *a, size_t position)
{
    return a->window != 0 && position + 1 > a->window ? position + 1 - a->window : 0;
}

/* `seen`: positions up to and with that of the queries' first token. */
static void attend_chunk(const attention *a, size_t head, const mq_queries *queries, size_t chunk, size_t seen, float *part)
{
    const size_t begin = chunk * MQ_ATTENTION_CHUNK;
    const mq_stored stored = mq_cache_at(a->cache, head, begin);
    a->session->kernels->attend(queries, seen - begin, &stored, part);
}

static void finish(const float *part, size_t dim, float *out)
{
    const float inverse = 1.0f / part[mq_padded_dim(dim) + MQ_PART_TOTAL];
    for (size_t i = 0; i < dim; i++) {
        out[i] = part[i] * inverse;
    }
}

/* Item: one kv head and MQ_ATTENTION_TOKENS tokens. */
static void attend_tokens(void *argument, size_t item, uint32_t thread)
{
    const attention *a = argument;
    mq_session *s = a->session;
    const size_t blocks = (a->n + MQ_ATTENTION_TOKENS - 1) / MQ_ATTENTION_TOKENS;
    const size_t head = item / blocks, first = item % blocks * MQ_ATTENTION_TOKENS;
    const size_t count = smaller(a->n - first, MQ_ATTENTION_TOKENS), position = s->position + first;
    const mq_queries all = queries_of(a, head, first, count);
    const size_t floats = mq_part_floats(all.head_dim), lowest = oldest_seen(a, position) / MQ_ATTENTION_CHUNK;
    float *parts = s->scratch[thread].parts, *next = s->scratch[thread].next;
    for (size_t chunk = lowest; chunk * MQ_ATTENTION_CHUNK < position + count; chunk++) {
        /* Tokens from `blind` on stand in the chunk or behind it; of those from `past` on the window does not reach back to it. */
        const size_t begin = chunk * MQ_ATTENTION_CHUNK, blind = begin > position ? begin - position : 0;
        size_t past = count;
        while (oldest_seen(a, position + past - 1) >= begin + MQ_ATTENTION_CHUNK) {
            past--;
        }
        const mq_queries seeing = queries_of(a, head, first + blind, past - blind);
        float *into = chunk == lowest ? parts : next; /* nobody's blind there */
        attend_chunk(a, head, &seeing, chunk, position + blind + 1, into);
        for (size_t i = 0; i < seeing.tokens * seeing.heads && into == next; i++) {
            float *part = parts + (blind * all.heads + i) * floats;
            if (oldest_seen(a, position + blind + i / all.heads) >= begin) { /* the token's first chunk */
                memcpy(part, next + i * floats, floats * sizeof *part);
            } else {
                s->kernels->join(part, next + i * floats, all.head_dim);
            }
        }
    }
    float *out = s->batch.attended + (all.query - s->batch.q);
    for (size_t i = 0; i < count * all.heads; i++) {
        finish(parts + i * floats, all.head_dim, out + i / all.heads * all.token_stride + i % all.heads * all.head_dim);
    }
}

/* Of one token: its first chunk, and how many it sees something of. */
static size_t lowest_chunk(const attention *a)
{
    return oldest_seen(a, a->end - 1) / MQ_ATTENTION_CHUNK;
}

static size_t chunks_of(const attention *a)
{
    return (a->end + MQ_ATTENTION_CHUNK - 1) / MQ_ATTENTION_CHUNK - lowest_chunk(a);
}

/* Of one token, parts [kv head][chunk that it sees][query head]. */
static float *part_at(const attention *a, size_t head, size_t chunk)
{
    const mq_hparams *hp = a->hparams;
    const size_t shared = hp->head_count / hp->head_count_kv;
    return a->session->parts + (head * chunks_of(a) + chunk) * shared * mq_part_floats(hp->head_dim);
}

/* Item: one kv head and CHUNKS_PER_ITEM chunks, of one token. */
static void attend_chunks(void *argument, size_t item, uint32_t thread)
{
    (void)thread;
    const attention *a = argument;
    const size_t spans = (chunks_of(a) + CHUNKS_PER_ITEM - 1) / CHUNKS_PER_ITEM, head = item / spans;
    const size_t first = item % spans * CHUNKS_PER_ITEM, last = smaller(first + CHUNKS_PER_ITEM, chunks_of(a));
    const mq_queries queries = queries_of(a, head, 0, 1);
    for (size_t chunk = first; chunk < last; chunk++) {
        attend_chunk(a, head, &queries, lowest_chunk(a) + chunk, a->end, part_at(a, head, chunk));
    }
}

static void join_chunks(const attention *a, size_t head)
{
    const mq_queries queries = queries_of(a, head, 0, 1);
    const size_t floats = mq_part_floats(queries.head_dim);
    float *out = a->session->batch.attended + (queries.query - a->session->batch.q);
    for (size_t h = 0; h < queries.heads; h++) {
        float *part = part_at(a, head, 0) + h * floats;
        for (size_t chunk = 1; chunk < chunks_of(a); chunk++) {
            a->session->kernels->join(part, part_at(a, head, chunk) + h * floats, queries.head_dim);
        }
        finish(part, queries.head_dim, out + h * queries.head_dim);
    }
}

void mq_attention_run(mq_session *session, uint32_t block, uint32_t n)
{
    const mq_hparams *hp = &session->model->hparams;
    attention a = {.session = session, .hparams = hp, .cache = &session->caches[block],
                   .window = session->model->blocks[block].window, .n = n, .end = (size_t)session->position + n};
    const size_t heads = hp->head_count_kv;
    mq_pool_run(session->pool, store_item, &a, (a.end - 1) / MQ_KEY_POSITIONS - session->position / MQ_KEY_POSITIONS + 1);
    if (n > 1) {
        mq_pool_run(session->pool, attend_tokens, &a, heads * ((n + MQ_ATTENTION_TOKENS - 1) / MQ_ATTENTION_TOKENS));
        return;
    }
    mq_pool_run(session->pool, attend_chunks, &a, heads * ((chunks_of(&a) + CHUNKS_PER_ITEM - 1) / CHUNKS_PER_ITEM));
    for (size_t head = 0; head < heads; head++) {
        join_chunks(&a, head);
    }
}
