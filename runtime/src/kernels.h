/* kernels.h: the table of kernels. One table per instruction set; every table gives the same bits.
 *
 * kernels/scalar.c is the definition of every operation. Float operations are fixed in order: elementwise ones use single
 * IEEE operations and fused multiply-adds exactly where scalar.c does; sums run in 16 lanes (element i in lane i % 16,
 * ascending) that are then folded 8, 4, 2, 1, but for those of attention, which take one element after another. So results do not depend on the instruction set, on the number of threads or
 * on how many tokens are computed together.
 */
#ifndef MQ_KERNELS_H
#define MQ_KERNELS_H

#include "definition.h"

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* The planes of one linear, layout tile16x128 (docs/format.md). tiles = ceil(rows/16), groups = ceil(columns/128). */
typedef struct mq_matrix {
    const uint8_t *plane[4];      /* [tiles][groups][512]; NULL when the file was cut before this slice */
    const uint16_t *scale_offset; /* f16 [tiles][groups][2][16] */
    uint32_t rows, columns, tiles, groups;
} mq_matrix;

/* n tokens quantised to int8 in groups of 128. */
typedef struct mq_activations {
    int8_t *q;     /* [n][groups·128], padded columns 0 */
    float *scale;  /* [n][groups] */
    float *sum;    /* [n][groups]: scale · (sum of q), rounded once */
    uint32_t groups;
} mq_activations;

/* The query heads of some tokens in a row that share one kv head: token t's are query + t·token_stride, [heads][head_dim]. */
typedef struct mq_queries {
    const float *query;
    size_t tokens, token_stride, heads, head_dim;
    float scale; /* of the scores */
    size_t window; /* positions that a token sees, its own counted; 0: all */
} mq_queries;

/* Keys and values of one chunk of positions. With scales they are int8 of groups of MQ_CACHE_GROUP dimensions (groups =
 * ceil(head_dim / MQ_CACHE_GROUP)), a number is code · scale, which float32 holds exactly; without, they are f16. */
typedef struct mq_stored {
    const void *key;             /* [positions / 16][head_dim][16] */
    const void *value;           /* [positions][head_dim padded to 16, with 0] */
    const uint16_t *key_scale;   /* f16 [positions / 16][groups][16], or NULL */
    const uint16_t *value_scale; /* f16 [positions][groups], or NULL */
} mq_stored;

typedef struct mq_kernels {
    const char *name;
    /* Quantise one token: x [columns] -> q [groups·128], scale [groups], sum [groups]. Returns the sum of squares of the
     * dequantised values: groups ascending, fma(scale·scale, sum of q·q, total). */
    float (*quantize)(const float *x, size_t columns, int8_t *q, float *scale, float *sum);
    /* One token: y[r] for the rows of tiles tile_begin..tile_end-1; y points at row 0, rows past `rows` are not written. */
    void (*matvec)(const mq_matrix *w, uint32_t depth, const int8_t *q, const float *scale, const float *sum,
                   size_t tile_begin, size_t tile_end, float *y);
    /* Tokens token[0..n-1] of x, all at one depth: y[token[i]·y_stride + r]. */
    void (*matmat)(const mq_matrix *w, uint32_t depth, const mq_activations *x, const uint32_t *token, size_t n,
                   size_t tile_begin, size_t tile_end, float *y, size_t y_stride);
    /* out[h] = sum over groups ascending of fma(scale, sum of hidden·q, total); hidden: int8 [n_hidden][groups·128]. */
    void (*router_hidden)(const int8_t *hidden, size_t n_hidden, const int8_t *q, const float *scale, size_t groups, float *out);
    /* y = (x · (1 / sqrt(mean(x²) + eps))) · weight */
    void (*rmsnorm)(const float *x, const float *weight, size_t n, float eps, float *y);
    /* Rotate halves of one head in place: cosine and sine [head_dim/2]. */
    void (*rope)(float *head, const float *cosine, const float *sine, size_t head_dim);
    /* Softmax attention over one chunk of MQ_ATTENTION_CHUNK positions. Token t stands seen + t − 1 positions behind the chunk's
     * first and sees those up to its own, or with a window the last `window` of them: at least one in the chunk.
     * part [tokens][heads][mq_part_floats(head_dim)]: the values' sum, each times its weight exp(score − largest score), then
     * the sum of the weights and the largest score. */
    void (*attend)(const mq_queries *queries, size_t seen, const mq_stored *stored, float *part);
    /* One query: `part` becomes what it and the part of the next chunk are together. */
    void (*join)(float *part, const float *next, size_t head_dim);
    /* gate = silu(gate) · up */
    void (*swiglu)(float *gate, const float *up, size_t n);
    /* x += y */
    void (*add)(float *x, const float *y, size_t n);
    /* f16 = round_half_even(x) */
    void (*to_f16)(const float *x, uint16_t *y, size_t n);
} mq_kernels;

/* Tables compiled in, best first; NULL past the end. */
const mq_kernels *mq_kernels_at(size_t index);
/* By name, or the best supported one for NULL. NULL when unknown or not supported by this CPU. */
const mq_kernels *mq_kernels_find(const char *name);
/* cffi: end */

enum { MQ_MAX_HEAD_DIM = 1024 };

/* Floats of one query's part: whole registers, then one more that starts with MQ_PART_TOTAL and MQ_PART_LARGEST. */
enum { MQ_PART_TOTAL = 0, MQ_PART_LARGEST = 1, MQ_PART_TAIL = 16 };

/* Of a chunk, whose first position stands seen − 1 before the token: the first position that the token sees, and the one after
 * the last. */
static inline size_t mq_seen_from(const mq_queries *queries, size_t seen)
{
    return queries->window != 0 && seen > queries->window ? seen - queries->window : 0;
}

static inline size_t mq_seen_to(size_t seen)
{
    return seen < MQ_ATTENTION_CHUNK ? seen : MQ_ATTENTION_CHUNK;
}

static inline size_t mq_padded_dim(size_t head_dim)
{
    return (head_dim + 15) / 16 * 16;
}

static inline size_t mq_cache_groups(size_t head_dim)
{
    return (head_dim + MQ_CACHE_GROUP - 1) / MQ_CACHE_GROUP;
}

static inline size_t mq_part_floats(size_t head_dim)
{
    return mq_padded_dim(head_dim) + MQ_PART_TAIL;
}

extern const mq_kernels mq_kernels_scalar;
#if defined(__x86_64__)
extern const mq_kernels mq_kernels_avx512vnni;
extern const mq_kernels mq_kernels_avx512bw;
extern const mq_kernels mq_kernels_avx2;
#if defined(__has_include)
#if __has_include(<avxvnniintrin.h>) /* GCC 11, Clang 12 */
#define MQ_AVXVNNI
extern const mq_kernels mq_kernels_avxvnni;
#endif
#endif
#elif defined(__aarch64__)
extern const mq_kernels mq_kernels_neon_dotprod;
extern const mq_kernels mq_kernels_neon;
#endif

#endif
