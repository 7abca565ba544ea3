/* session.h: what one conversation owns: KV cache, buffers of a batch, settings, counters. */
#ifndef MQ_SESSION_H
#define MQ_SESSION_H

#include "cache.h"
#include "linear.h"
#include "model.h"
#include "router.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdbool.h>

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
    float asked_bits;      /* routed: the average asked for; 0: depths from the table */
    uint32_t stretch_end;  /* routed: the thresholds hold for positions before this one; 0: they must be set */
    uint32_t output_depth;
    uint8_t *table;        /* [block][7] depth of every linear of an unrouted budget */
    float *thresholds;     /* [block][7][3] of the present stretch */
    float *asked_at;       /* [n_ctx] asked_bits of every position */
    mq_cache *caches;      /* [block] */
    mq_cache_type key_type, value_type;
    size_t cache_bytes;    /* of their keys and values */
    uint32_t oldest;       /* position from which on rings hold everything; 0 without a window */
    float *cosine, *sine;  /* [n_ctx][head_dim / 2] */
    uint8_t *depths;       /* [n_ctx][block][7] */
    mq_batch batch;
    mq_scratch *scratch;   /* [threads] */
    float *parts;          /* of one token: [kv head][chunk of n_ctx][heads of one kv head] */
    void **allocations;    /* everything above, freed together */
    size_t n_allocations;
    mq_stats stats;
    struct mq_cuda_session *device; /* NULL: the CPU (device.h) */
    bool budget_changed;            /* since the device was told */
};

/* forward.c: tokens [n], n ≤ n_batch, at positions position .. position + n − 1; logits of the last n_logits. */
void mq_forward(mq_session *session, const int32_t *tokens, uint32_t n, float *logits, uint32_t n_logits);
/* forward.c: after mq_forward on n tokens: their final-norm hidden states, the last n_hidden, [n_hidden][embedding_length]. */
void mq_forward_hidden(const mq_session *session, uint32_t n, float *hidden, uint32_t n_hidden);

/* Every call that changes or copies a session takes it; a second thread gets MQ_ERR_BUSY and not a race. */
mq_status mq_session_acquire(mq_session *session, mq_error *error);
void mq_session_release(mq_session *session);

#endif
