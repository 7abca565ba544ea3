/* hparams.h: the hyper-parameters of a model and their limits. */
#ifndef MQ_HPARAMS_H
#define MQ_HPARAMS_H

#include "gguf.h"

enum { MQ_MAX_BUDGETS = 256, MQ_MAX_ROUTER_HIDDEN = 16 };

typedef struct mq_hparams {
    uint32_t vocab_size, context_length, embedding_length, block_count, feed_forward_length;
    uint32_t head_count, head_count_kv, head_dim;
    uint32_t embedding_depth, output_depth, router_hidden;
    uint32_t budget_count;
    float budgets[MQ_MAX_BUDGETS]; /* average bits, ascending from 2 to 8 */
    float rms_epsilon;
    uint32_t sliding_window; /* positions that a token sees in a windowed block, its own counted; 0: there is none */
} mq_hparams;

/* Read and check every key; MQ_ERR_UNSUPPORTED for another version, architecture or layout. */
mq_status mq_hparams_read(const gguf_file *file, mq_hparams *hparams, mq_error *error);

/* *value becomes entry `block` of an optional u32 array with one entry per block, each at most `high`; without the key it
 * stays as it is. */
mq_status mq_hparams_of_block(const gguf_file *file, const char *key, const mq_hparams *hparams, uint32_t block, uint32_t high,
                              uint32_t *value, mq_error *error);

#endif
