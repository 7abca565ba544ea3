/* attention_body.h: attention over one chunk of positions, written once over registers of 16 floats (vector_body.h, which
 * comes first). Up to QUERIES queries share every key and value that is read and widened from f16, or from int8 and scales.
 *
 * Keys lie 16 positions to a register, so that a score grows in one lane and nothing is folded; values lie 16 dimensions to
 * a register. Every score and every dimension of the result is one chain of fused multiply-adds in ascending order, as in
 * scalar.c, however many of them are computed side by side.
 *
 * Expected besides vector_body.h's list:
 *   v_max_fold, v_load_i8
 *   SCORES  registers of scores that grow side by side: QUERIES or a multiple of it
 *   VALUES  registers of values read at once
 */
#include "f16.h"

#include <stdbool.h>

enum { QUERIES = 4 };

/* How far ahead bytes are asked for: the hardware prefetcher stops at every page. Of 2 to 16 kB, 8 and 16 were the fastest.
 * Past the end of a chunk that is the start of the next one. */
enum { AHEAD = 8192 };

/* Scores of 16·blocks positions from block `first` of the chunk on: score[q·MQ_ATTENTION_CHUNK + position]. */
INLINE void score_blocks(bool int8, size_t queries, size_t blocks, const float *const query[QUERIES], const mq_stored *stored,
                         size_t first, size_t dim, float scale, float *score)
{
    const uint16_t *halves = (const uint16_t *)stored->key + first * dim * LANES;
    const int8_t *codes = (const int8_t *)stored->key + first * dim * LANES;
    const size_t groups = mq_cache_groups(dim);
    v16 dot[SCORES];
    for (size_t i = 0; i < queries * blocks; i++) {
        dot[i] = v_zero();
    }
    for (size_t begin = 0; begin < dim; begin += int8 ? MQ_CACHE_GROUP : dim) {
        const size_t end = int8 && dim - begin > MQ_CACHE_GROUP ? begin + MQ_CACHE_GROUP : dim;
        v16 step[SCORES];
        for (size_t b = 0; b < blocks && int8; b++) {
            step[b] = v_load_f16(stored->key_scale + ((first + b) * groups + begin / MQ_CACHE_GROUP) * LANES);
        }
        for (size_t i = begin; i < end; i++) {
            v16 k[SCORES];
            for (size_t b = 0; b < blocks; b++) {
                const size_t at = (b * dim + i) * LANES;
                k[b] = int8 ? v_mul(v_load_i8(codes + at), step[b]) : v_load_f16(halves + at);
                __builtin_prefetch(int8 ? (const char *)(codes + at) + AHEAD : (const char *)(halves + at) + AHEAD);
            }
            for (size_t q = 0; q < queries; q++) {
                const v16 x = v_set(query[q][i]);
                for (size_t b = 0; b < blocks; b++) {
                    dot[q * blocks + b] = v_fma(x, k[b], dot[q * blocks + b]);
                }
            }
        }
    }
    for (size_t q = 0; q < queries; q++) {
        for (size_t b = 0; b < blocks; b++) {
            v_store(score + q * MQ_ATTENTION_CHUNK + (first + b) * LANES, v_mul(dot[q * blocks + b], v_set(scale)));
        }
    }
}

INLINE void score_chunk(bool int8, size_t queries, const float *const query[QUERIES], const mq_stored *stored, size_t first,
                        size_t blocks, size_t dim, float scale, float *score)
{
    const size_t at_once = SCORES / queries;
    size_t b = first;
    for (; b + at_once <= blocks; b += at_once) {
        score_blocks(int8, queries, at_once, query, stored, b, dim, scale, score);
    }
    for (; b < blocks; b++) {
        score_blocks(int8, queries, 1, query, stored, b, dim, scale, score);
    }
}

/* Scores of positions from .. seen − 1 become weights; the part's tail gets their sum and the largest score. */
static void weigh(float *score, size_t from, size_t seen, float *tail)
{
    const size_t start = from - from % LANES, whole = seen - seen % LANES;
    for (size_t p = start; p < from; p++) {
        score[p] = -INFINITY;
    }
    for (size_t p = seen; p % LANES != 0; p++) {
        score[p] = -INFINITY;
    }
    v16 largest = v_set(-INFINITY), total = v_zero();
    for (size_t p = start; p < seen; p += LANES) {
        largest = v_max(v_load(score + p), largest);
    }
    const float most = v_max_fold(largest);
    for (size_t p = start; p < seen; p += LANES) {
        v_store(score + p, v_exponential(v_sub(v_load(score + p), v_set(most))));
    }
    for (size_t p = start; p < from; p++) { /* what is not seen adds 0, not exp(−87) */
        score[p] = 0.0f;
    }
    for (size_t p = start; p < whole; p += LANES) {
        total = v_add(total, v_load(score + p));
    }
    if (whole < seen) { /* nor do lanes past the end */
        total = v_add(total, v_load_part(score + whole, seen - whole));
    }
    tail[MQ_PART_TOTAL] = v_fold(total);
    tail[MQ_PART_LARGEST] = most;
}

/* The values of a chunk as the sums read them. */
typedef struct values {
    const void *value; /* f16, or int8 */
    const float *step; /* of int8: [position][groups] */
    size_t stride, groups;
} values;

/* sum[q][0 .. 16·count − 1] = Σ weight·value over positions from .. to − 1, added to what is there unless `anew`. */
INLINE void add_values(bool int8, size_t queries, size_t count, const float *weight, const values *v, size_t from, size_t to,
                       float *const sum[QUERIES], size_t first, bool anew)
{
    v16 total[QUERIES * VALUES];
    for (size_t i = 0; i < queries * count; i++) {
        total[i] = anew ? v_zero() : v_load(sum[i / count] + first + i % count * LANES);
    }
    for (size_t p = from; p < to; p++) {
        v16 read[VALUES];
        for (size_t i = 0; i < count; i++) {
            const size_t dimension = first + i * LANES;
            if (int8) {
                const int8_t *codes = (const int8_t *)v->value + p * v->stride + dimension;
                read[i] = v_mul(v_load_i8(codes), v_set(v->step[p * v->groups + dimension / MQ_CACHE_GROUP]));
                __builtin_prefetch((const char *)codes + AHEAD);
            } else {
                const uint16_t *halves = (const uint16_t *)v->value + p * v->stride + dimension;
                read[i] = v_load_f16(halves);
                __builtin_prefetch((const char *)halves + AHEAD);
            }
        }
        for (size_t q = 0; q < queries; q++) {
            const v16 w = v_set(weight[q * MQ_ATTENTION_CHUNK + p]);
            for (size_t i = 0; i < count; i++) {
                total[q * count + i] = v_fma(w, read[i], total[q * count + i]);
            }
        }
    }
    for (size_t i = 0; i < queries * count; i++) {
        v_store(sum[i / count] + first + i % count * LANES, total[i]);
    }
}

/* What a query sees of a chunk: positions from .. to − 1. */
typedef struct span {
    size_t from, to;
} span;

/* Positions that all the queries see, together; before and after them, for each query those that it does not share. */
INLINE void sum_dimensions(bool int8, size_t queries, size_t count, const float *weight, const values *v,
                           const span seen[QUERIES], float *const sum[QUERIES], size_t first)
{
    const size_t from = seen[queries - 1].from, to = seen[0].to > from ? seen[0].to : from;
    const bool early = seen[0].from < from;
    for (size_t q = 0; q < queries && early; q++) {
        const size_t end = seen[q].to < from ? seen[q].to : from;
        add_values(int8, 1, count, weight + q * MQ_ATTENTION_CHUNK, v, seen[q].from, end, sum + q, first, true);
    }
    add_values(int8, queries, count, weight, v, from, to, sum, first, !early);
    for (size_t q = 0; q < queries; q++) {
        if (seen[q].to > to) {
            add_values(int8, 1, count, weight + q * MQ_ATTENTION_CHUNK, v, to, seen[q].to, sum + q, first, false);
        }
    }
}

INLINE void sum_chunk(bool int8, size_t queries, const float *weight, const values *v, const span seen[QUERIES],
                      float *const sum[QUERIES])
{
    size_t first = 0;
    for (; first + VALUES * LANES <= v->stride; first += VALUES * LANES) {
        sum_dimensions(int8, queries, VALUES, weight, v, seen, sum, first);
    }
    for (; first < v->stride; first += LANES) {
        sum_dimensions(int8, queries, 1, weight, v, seen, sum, first);
    }
}

/* Queries in order of what they see. */
INLINE void attend_together(size_t queries, const float *const query[QUERIES], const span seen[QUERIES], const mq_queries *all,
                            const mq_stored *stored, const values *v, float *const part[QUERIES])
{
    _Alignas(64) float weight[QUERIES * MQ_ATTENTION_CHUNK];
    const size_t blocks = (seen[queries - 1].to + LANES - 1) / LANES, first = seen[0].from / LANES;
    if (stored->key_scale != NULL) {
        score_chunk(true, queries, query, stored, first, blocks, all->head_dim, all->scale, weight);
    } else {
        score_chunk(false, queries, query, stored, first, blocks, all->head_dim, all->scale, weight);
    }
    for (size_t q = 0; q < queries; q++) {
        weigh(weight + q * MQ_ATTENTION_CHUNK, seen[q].from, seen[q].to, part[q] + v->stride);
    }
    if (stored->value_scale != NULL) {
        sum_chunk(true, queries, weight, v, seen, part);
    } else {
        sum_chunk(false, queries, weight, v, seen, part);
    }
}

static void widen_steps(const uint16_t *scale, size_t from, size_t to, float *step)
{
    size_t i = from;
    for (; i + LANES <= to; i += LANES) {
        v_store(step + i, v_load_f16(scale + i));
    }
    for (; i < to; i++) {
        step[i] = mq_f16_to_f32(scale[i]);
    }
}

static void attend(const mq_queries *queries, size_t seen, const mq_stored *stored, float *part)
{
    const size_t count = queries->tokens * queries->heads, dim = queries->head_dim, groups = mq_cache_groups(dim);
    _Alignas(64) float step[MQ_ATTENTION_CHUNK * MQ_MAX_HEAD_DIM / MQ_CACHE_GROUP];
    const values v = {stored->value, step, mq_padded_dim(dim), groups};
    if (stored->value_scale != NULL) {
        widen_steps(stored->value_scale, mq_seen_from(queries, seen) * groups, mq_seen_to(seen + queries->tokens - 1) * groups,
                    step);
    }
    for (size_t first = 0; first < count;) {
        const size_t left = count - first, n = left >= QUERIES ? QUERIES : left >= 2 ? 2 : 1;
        const float *query[QUERIES];
        float *parts[QUERIES];
        span sees[QUERIES];
        for (size_t q = 0; q < n; q++) {
            const size_t token = (first + q) / queries->heads, head = (first + q) % queries->heads;
            query[q] = queries->query + token * queries->token_stride + head * dim;
            parts[q] = part + (first + q) * mq_part_floats(dim);
            sees[q] = (span){mq_seen_from(queries, seen + token), mq_seen_to(seen + token)};
        }
        switch (n) { /* a constant number keeps sums in registers */
        case QUERIES: attend_together(QUERIES, query, sees, queries, stored, &v, parts); break;
        case 2: attend_together(2, query, sees, queries, stored, &v, parts); break;
        default: attend_together(1, query, sees, queries, stored, &v, parts); break;
        }
        first += n;
    }
}

static void join(float *part, const float *next, size_t head_dim)
{
    const size_t padded = mq_padded_dim(head_dim);
    float *tail = part + padded;
    const float *next_tail = next + padded;
    const float most = next_tail[MQ_PART_LARGEST] > tail[MQ_PART_LARGEST] ? next_tail[MQ_PART_LARGEST] : tail[MQ_PART_LARGEST];
    const v16 mine = v_exponential(v_set(tail[MQ_PART_LARGEST] - most));
    const v16 theirs = v_exponential(v_set(next_tail[MQ_PART_LARGEST] - most));
    for (size_t i = 0; i <= padded; i += LANES) { /* the last register holds the total */
        v_store(part + i, v_fma(v_load(part + i), mine, v_mul(v_load(next + i), theirs)));
    }
    tail[MQ_PART_LARGEST] = most;
}
