/* attention_body.h: attention over one chunk of positions, written once over registers of 16 floats (vector_body.h, which
 * comes first). Up to QUERIES queries share every key and value that is read and widened from f16.
 *
 * Keys lie 16 positions to a register, so that a score grows in one lane and nothing is folded; values lie 16 dimensions to
 * a register. Every score and every dimension of the result is one chain of fused multiply-adds in ascending order, as in
 * scalar.c, however many of them are computed side by side.
 *
 * Expected besides vector_body.h's list:
 *   v_max_fold
 *   SCORES  registers of scores that grow side by side: QUERIES or a multiple of it
 *   VALUES  registers of values read at once
 */
enum { QUERIES = 4 };

/* How far ahead bytes are asked for, in f16: the hardware prefetcher stops at every page. Of 2 to 16 kB, 8 and 16 were the
 * fastest. Past the end of a chunk that is the start of the next one. */
enum { AHEAD = 4096 };

/* Scores of 16·blocks positions from `key` on: score[q·MQ_ATTENTION_CHUNK + position]. */
INLINE void score_blocks(size_t queries, size_t blocks, const float *const query[QUERIES], const uint16_t *key, size_t dim,
                         float scale, float *score)
{
    v16 dot[SCORES];
    for (size_t i = 0; i < queries * blocks; i++) {
        dot[i] = v_zero();
    }
    for (size_t i = 0; i < dim; i++) {
        v16 k[SCORES];
        for (size_t b = 0; b < blocks; b++) {
            k[b] = v_load_f16(key + (b * dim + i) * LANES);
            __builtin_prefetch(key + (b * dim + i) * LANES + AHEAD);
        }
        for (size_t q = 0; q < queries; q++) {
            const v16 x = v_set(query[q][i]);
            for (size_t b = 0; b < blocks; b++) {
                dot[q * blocks + b] = v_fma(x, k[b], dot[q * blocks + b]);
            }
        }
    }
    for (size_t q = 0; q < queries; q++) {
        for (size_t b = 0; b < blocks; b++) {
            v_store(score + q * MQ_ATTENTION_CHUNK + b * LANES, v_mul(dot[q * blocks + b], v_set(scale)));
        }
    }
}

/* Scores become weights; the part's tail gets their sum and the largest score. */
static void weigh(float *score, size_t seen, float cap, float *tail)
{
    const size_t whole = seen - seen % LANES;
    for (size_t p = 0; cap != 0.0f && p < seen; p += LANES) {
        v_store(score + p, v_soft_cap(v_load(score + p), cap));
    }
    for (size_t p = seen; p % LANES != 0; p++) {
        score[p] = -INFINITY;
    }
    v16 largest = v_set(-INFINITY), total = v_zero();
    for (size_t p = 0; p < seen; p += LANES) {
        largest = v_max(v_load(score + p), largest);
    }
    const float most = v_max_fold(largest);
    for (size_t p = 0; p < seen; p += LANES) {
        v_store(score + p, v_exponential(v_sub(v_load(score + p), v_set(most))));
    }
    for (size_t p = 0; p < whole; p += LANES) {
        total = v_add(total, v_load(score + p));
    }
    if (whole < seen) { /* lanes past the end add 0, not exp(−87) */
        total = v_add(total, v_load_part(score + whole, seen - whole));
    }
    tail[MQ_PART_TOTAL] = v_fold(total);
    tail[MQ_PART_LARGEST] = most;
}

/* sum[q][0 .. 16·count − 1] = Σ weight·value over positions from .. to − 1, added to what is there unless from is 0. */
INLINE void add_values(size_t queries, size_t count, const float *weight, const uint16_t *value, size_t stride, size_t from,
                       size_t to, float *const sum[QUERIES], size_t first)
{
    v16 total[QUERIES * VALUES];
    for (size_t i = 0; i < queries * count; i++) {
        total[i] = from == 0 ? v_zero() : v_load(sum[i / count] + first + i % count * LANES);
    }
    for (size_t p = from; p < to; p++) {
        v16 v[VALUES];
        for (size_t i = 0; i < count; i++) {
            v[i] = v_load_f16(value + p * stride + first + i * LANES);
            __builtin_prefetch(value + p * stride + first + i * LANES + AHEAD);
        }
        for (size_t q = 0; q < queries; q++) {
            const v16 w = v_set(weight[q * MQ_ATTENTION_CHUNK + p]);
            for (size_t i = 0; i < count; i++) {
                total[q * count + i] = v_fma(w, v[i], total[q * count + i]);
            }
        }
    }
    for (size_t i = 0; i < queries * count; i++) {
        v_store(sum[i / count] + first + i % count * LANES, total[i]);
    }
}

/* Positions that all the queries see, together; then for each query those that it sees alone. */
INLINE void sum_values(size_t queries, size_t count, const float *weight, const uint16_t *value, size_t stride,
                       const size_t seen[QUERIES], float *const sum[QUERIES], size_t first)
{
    add_values(queries, count, weight, value, stride, 0, seen[0], sum, first);
    for (size_t q = 1; q < queries; q++) {
        if (seen[q] > seen[0]) {
            add_values(1, count, weight + q * MQ_ATTENTION_CHUNK, value, stride, seen[0], seen[q], sum + q, first);
        }
    }
}

/* Queries in order of what they see. */
INLINE void attend_together(size_t queries, const float *const query[QUERIES], const size_t seen[QUERIES], const mq_queries *all,
                            const uint16_t *key, const uint16_t *value, float *const part[QUERIES])
{
    _Alignas(64) float weight[QUERIES * MQ_ATTENTION_CHUNK];
    const size_t dim = all->head_dim, padded = mq_padded_dim(dim);
    const size_t blocks = (seen[queries - 1] + LANES - 1) / LANES, at_once = SCORES / queries;
    const float scale = all->scale;
    size_t b = 0;
    for (; b + at_once <= blocks; b += at_once) {
        score_blocks(queries, at_once, query, key + b * dim * LANES, dim, scale, weight + b * LANES);
    }
    for (; b < blocks; b++) {
        score_blocks(queries, 1, query, key + b * dim * LANES, dim, scale, weight + b * LANES);
    }
    for (size_t q = 0; q < queries; q++) {
        weigh(weight + q * MQ_ATTENTION_CHUNK, seen[q], all->softcap, part[q] + padded);
    }
    size_t first = 0;
    for (; first + VALUES * LANES <= padded; first += VALUES * LANES) {
        sum_values(queries, VALUES, weight, value, padded, seen, part, first);
    }
    for (; first < padded; first += LANES) {
        sum_values(queries, 1, weight, value, padded, seen, part, first);
    }
}

static void attend(const mq_queries *queries, size_t seen, const uint16_t *key, const uint16_t *value, float *part)
{
    const size_t count = queries->tokens * queries->heads, dim = queries->head_dim;
    for (size_t first = 0; first < count;) {
        const size_t left = count - first, n = left >= QUERIES ? QUERIES : left >= 2 ? 2 : 1;
        const float *query[QUERIES];
        float *parts[QUERIES];
        size_t sees[QUERIES];
        for (size_t q = 0; q < n; q++) {
            const size_t token = (first + q) / queries->heads, head = (first + q) % queries->heads;
            query[q] = queries->query + token * queries->token_stride + head * dim;
            parts[q] = part + (first + q) * mq_part_floats(dim);
            sees[q] = seen + token < MQ_ATTENTION_CHUNK ? seen + token : MQ_ATTENTION_CHUNK;
        }
        switch (n) { /* a constant number keeps sums in registers */
        case QUERIES: attend_together(QUERIES, query, sees, queries, key, value, parts); break;
        case 2: attend_together(2, query, sees, queries, key, value, parts); break;
        default: attend_together(1, query, sees, queries, key, value, parts); break;
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
