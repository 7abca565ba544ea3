/* hparams.h: the hyper-parameters of a model and their limits. */
#ifndef MQ_HPARAMS_H
#define MQ_HPARAMS_H

#include "gguf.h"
#include "file_limits.h"

typedef struct mq_hparams {
    uint32_t vocab_size, context_length, embedding_length, block_count, feed_forward_length;
    uint32_t head_count, head_count_kv, head_dim;
    uint32_t embedding_depth, output_depth, router_hidden;
    uint32_t budget_count;
    float budgets[MQ_MAX_BUDGETS]; /* average bits, ascending from 2 to 8 */
    float rms_epsilon;
} mq_hparams;

/* Read and check every key; MQ_ERR_UNSUPPORTED for another version, architecture or layout. */
mq_status mq_hparams_read(const gguf_file *file, mq_hparams *hparams, mq_error *error);

#endif
