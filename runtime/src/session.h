/* session.h: what one conversation owns: KV cache, buffers of a batch, settings, counters. */
#ifndef MQ_SESSION_H
#define MQ_SESSION_H

#include "cache.h"
#include "linear.h"
#include "model.h"
#include "router.h"
#include "threads.h"

#include <stdatomic.h>

/* Buffers of up to n_batch tokens. E embedding length, Q heads·head_dim, KV kv heads·head_dim, F feed-forward length. */
typedef struct mq_batch {
    float *x;            /* [B][E] the residual stream */
    float *normed;       /* [B][E] */
    float *q, *k, *v;    /* [B][Q], [B][KV], [B][KV] */
    float *attended;     /* [B][Q] */
    float *gate, *up;    /* [B][F] */
    float *branch;       /* [B][E] what a sub-layer adds to x */
    mq_activations activations; /* of the widest input */
    uint32_t *order[MQ_MAX_JOBS]; /* [B] tokens by depth */
} mq_batch;

/* Scratch of one thread: parts of a softmax (kernels.h), [MQ_ATTENTION_TOKENS][heads of one kv head]. */
typedef struct mq_scratch {
    float *parts, *next;
} mq_scratch;

struct mq_session {
    const mq_model *model;
    const mq_kernels *kernels;
    mq_pool *pool;
    atomic_flag busy;
    uint32_t n_ctx, n_batch;
    uint32_t position;
    float attention_scale; /* 1 / sqrt(head_dim) */
    uint32_t fixed_depth;  /* 0: routed */
    uint32_t output_depth;
    float *thresholds;     /* [block][7][3] at the asked average bits */
    mq_cache cache;
    float *cosine, *sine;  /* [n_ctx][head_dim / 2] */
    uint8_t *depths;       /* [n_ctx][block][7] */
    mq_batch batch;
    mq_scratch *scratch;   /* [threads] */
    float *parts;          /* of one token: [kv head][chunk of n_ctx][heads of one kv head] */
    void **allocations;    /* everything above, freed together */
    size_t n_allocations;
    mq_stats stats;
};

/* forward.c: tokens [n], n ≤ n_batch, at positions position .. position + n − 1; logits of the last n_logits. */
void mq_forward(mq_session *session, const int32_t *tokens, uint32_t n, float *logits, uint32_t n_logits);

#endif
