/* model.h: an opened file, with every tensor bound to its place. Immutable after mq_model_open. */
#ifndef MQ_MODEL_H
#define MQ_MODEL_H

#include "gguf.h"
#include "hparams.h"
#include "kernels.h"
#include "keys.h"
#include "mapping.h"

/* A router serves the linears that read one input (docs/format.md, Routers). Pointers into the file. */
typedef struct mq_router {
    const int8_t *hidden;        /* [router_hidden][groups·128] */
    const float *hidden_scale, *hidden_bias; /* [router_hidden] */
    const float *head;           /* [linears][3][router_hidden + 1] */
    const float *head_bias;      /* [linears][3] */
    const float *threshold;      /* [linears][3][budget_count] */
    uint32_t linears;
    uint32_t columns, groups;    /* of the input */
} mq_router;

/* Vectors that an architecture does not have are NULL in every block. */
typedef struct mq_block {
    const float *attn_norm, *ffn_norm;           /* [embedding_length], of the inputs of attention and feed-forward */
    const float *attn_post_norm, *ffn_post_norm; /* [embedding_length], of what they add to the residual stream */
    const float *q_norm, *k_norm;       /* [head_dim], of every head before the rotation */
    const float *bias[MQ_BIASES];       /* [rows] of the first linears */
    size_t vector_bytes;                /* of all these */
    uint32_t rope;                      /* MQ_ROPE_...: the table its heads are rotated by */
    uint32_t window;                    /* positions that a token sees, its own counted; 0: all */
    mq_matrix linear[MQ_LINEARS];       /* order of MQ_LINEAR_NAMES */
    mq_router router[MQ_ROUTERS];       /* order of MQ_ROUTER_NAMES */
} mq_block;

struct mq_model {
    char *path;
    mq_mapping mapping;
    gguf_file file;
    mq_hparams hparams;
    mq_block *blocks;      /* [block_count] */
    mq_matrix embedding, output; /* output is the embedding when tied */
    const float *output_norm;
    const float *inv_freq[MQ_ROPES]; /* [rope_dim / 2], of MQ_ROPE_MAIN and _LOCAL; NULL: no block uses it */
    const uint8_t *checksums; /* u32 [tensor_count + 1] in the file, unaligned (check.h); NULL: it has none */
    uint32_t *static_order; /* [3·7·block_count] (static_order.h); NULL: the file has none */
    mq_model_info info;
    struct mq_device *device;   /* NULL: the CPU (device.h) */
    char device_note[512];      /* why not the GPU, or "" */
};

/* As mq_model_open on bytes that are in memory already; takes over `mapping`, also when it fails. `path` is for messages. */
mq_status mq_model_open_mapping(const char *path, mq_mapping mapping, const mq_model_options *options, mq_model **model,
                                mq_error *error);

/* Bytes of the file that a token reads in one linear at `depth`: planes, scales and offsets. */
size_t mq_matrix_bytes(const mq_matrix *matrix, uint32_t depth);

#endif
