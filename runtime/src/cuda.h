/* cuda.h: the table of functions between this library and the optional CUDA library, which is opened at run time
 * (src/device.c) and never linked. Both sides are built from one tree: the size of the model's structure and the number below
 * must agree. Every function that can fail returns 0 or fills in a message.
 */
#ifndef MQ_CUDA_H
#define MQ_CUDA_H

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MQ_CUDA_ABI = 2, MQ_CUDA_MESSAGE = 320 };

typedef struct mq_cuda_model mq_cuda_model;     /* a file's tensors in the memory of a GPU */
typedef struct mq_cuda_session mq_cuda_session; /* a KV cache and the buffers of a pass there */

typedef struct mq_cuda_message {
    char text[MQ_CUDA_MESSAGE];
} mq_cuda_message;

typedef struct mq_cuda_device {
    char name[256];
    int32_t major, minor;       /* compute capability */
    uint64_t memory, available; /* bytes */
    int32_t integrated;         /* 1: it shares the host's memory */
} mq_cuda_device;

/* Bytes in the memory of the GPU. */
typedef struct mq_cuda_memory {
    uint64_t weights, cache, workspace;
} mq_cuda_memory;

/* What one pass gives back; NULL or 0: not wanted. Rows are those of the last tokens. */
typedef struct mq_cuda_output {
    float *logits;  /* [n_logits][vocab_size] */
    uint32_t n_logits, output_depth;
    float *hidden;  /* [n_hidden][embedding_length] after the final norm */
    uint32_t n_hidden;
    uint8_t *depths; /* [n][block_count][7] */
} mq_cuda_output;

typedef struct mq_cuda_session_options {
    uint32_t n_ctx, n_batch;
    float attention_scale;
    const float *cosine, *sine; /* [n_ctx][rope_dim / 2]; NULL: no block rotates its heads */
} mq_cuda_session_options;

typedef struct mq_cuda_api {
    int32_t (*describe)(mq_cuda_device *device, mq_cuda_message *message);
    /* Why this model cannot run there, or NULL. */
    const char *(*refuses)(const mq_model *model);
    int32_t (*model_open)(const mq_model *model, mq_cuda_model **out, mq_cuda_message *message);
    void (*model_close)(mq_cuda_model *model);
    int32_t (*session_open)(mq_cuda_model *model, const mq_cuda_session_options *options, mq_cuda_session **out,
                            mq_cuda_message *message);
    void (*session_close)(mq_cuda_session *session);
    void (*memory)(const mq_cuda_session *session, mq_cuda_memory *memory);
    /* thresholds [block][7][3] when routed, else table [block][7]. */
    int32_t (*set_budget)(mq_cuda_session *session, const float *thresholds, const uint8_t *table, mq_cuda_message *message);
    /* n ≤ n_batch tokens at position .. position + n − 1. */
    int32_t (*forward)(mq_cuda_session *session, const int32_t *tokens, uint32_t n, uint32_t position,
                       const mq_cuda_output *output, mq_cuda_message *message);
    /* Evaluate `token` and then, n − 1 times, the most likely token after it; chosen [n]: the token after each of them.
     * depths [n][block_count][7]. milliseconds: on the GPU, may be NULL. */
    int32_t (*greedy)(mq_cuda_session *session, int32_t token, uint32_t n, uint32_t position, uint32_t output_depth,
                      int32_t *chosen, uint8_t *depths, float *milliseconds, mq_cuda_message *message);
    /* Keys, then values, of the positions before `position`, f16 [block][kv head][position][head_dim]: to `out`, or, when it is
     * NULL, from `in`. */
    int32_t (*copy_cache)(mq_cuda_session *session, uint32_t position, uint8_t *out, const uint8_t *in, mq_cuda_message *message);
    /* Microseconds per mat-vec of a rows x columns linear at `depth`, in each of `repeats` passes over so many random copies that
     * the second-level cache holds none of them. *bytes: what one reads. */
    int32_t (*measure_matvec)(uint32_t rows, uint32_t columns, uint32_t depth, uint32_t repeats, double *microseconds, size_t *bytes,
                              mq_cuda_message *message);
} mq_cuda_api;

/* The library's one symbol: NULL when it was built from another tree. */
typedef const mq_cuda_api *mq_cuda_open_function(uint32_t abi, size_t model_size);
#define MQ_CUDA_SYMBOL "mq_cuda_open"

#ifdef __cplusplus
}
#endif

#endif
