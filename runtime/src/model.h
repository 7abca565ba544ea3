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

typedef struct mq_block {
    const float *attn_norm, *ffn_norm;  /* [embedding_length] */
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
    const float *inv_freq; /* [head_dim / 2] */
    uint32_t *static_order; /* [3·7·block_count] (static_order.h); NULL: the file has none */
    mq_model_info info;
    struct mq_device *device;   /* NULL: the CPU (device.h) */
    char device_note[512];      /* why not the GPU, or "" */
};

/* Bytes of the file that a token reads in one linear at `depth`: planes, scales and offsets. */
size_t mq_matrix_bytes(const mq_matrix *matrix, uint32_t depth);

#endif
