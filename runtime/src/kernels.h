/* kernels.h: the table of kernels. One table per instruction set; every table gives the same bits.
 *
 * kernels/scalar.c is the definition of every operation. Float operations are fixed in order: elementwise ones use single
 * IEEE operations and fused multiply-adds exactly where scalar.c does; sums run in 16 lanes (element i in lane i % 16,
 * ascending) that are then folded 8, 4, 2, 1. So results do not depend on the instruction set, on the number of threads or
 * on how many tokens are computed together.
 */
#ifndef MQ_KERNELS_H
#define MQ_KERNELS_H

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
    /* One query head over n positions. query [head_dim_padded]; key, value: f16, position p at p·stride; head_dim_padded is
     * a multiple of 16, padding 0. scores: [n] scratch. out [head_dim_padded]. Softmax over n·scale-d scores. */
    void (*attention)(const float *query, const uint16_t *key, const uint16_t *value, size_t stride, size_t n,
                      size_t head_dim_padded, float scale, float *scores, float *out);
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
