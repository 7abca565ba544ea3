/* hparams.h: the hyper-parameters of a model and their limits. */
#ifndef MQ_HPARAMS_H
#define MQ_HPARAMS_H

#include "gguf.h"
#include "file_limits.h"

/* Which rotary table a block uses: values of mobiquant.rope.pattern. */
enum { MQ_ROPE_NONE, MQ_ROPE_MAIN, MQ_ROPE_LOCAL, MQ_ROPES = MQ_ROPE_LOCAL };
enum { MQ_ACTIVATION_SILU, MQ_ACTIVATION_GELU_TANH };
/* How the rotation was stretched. All but the dynamic kind are in the frequencies of the file. */
enum { MQ_SCALING_NONE, MQ_SCALING_LINEAR, MQ_SCALING_DYNAMIC, MQ_SCALING_LLAMA3, MQ_SCALING_YARN };

/* What is optional in the file says how an architecture differs from plain Llama, which the defaults are. */
typedef struct mq_hparams {
    uint32_t vocab_size, context_length, embedding_length, block_count, feed_forward_length;
    uint32_t head_count, head_count_kv, head_dim;
    uint32_t embedding_depth, output_depth, router_hidden;
    uint32_t budget_count;
    float budgets[MQ_MAX_BUDGETS]; /* average bits, ascending from 2 to 8 */
    float rms_epsilon;
    uint32_t rope_dim;       /* leading dimensions of a head that are rotated, even */
    uint32_t rope_scaling;   /* MQ_SCALING_... */
    uint32_t rope_original;  /* dynamic: context length that needs no stretching */
    float rope_factor;       /* dynamic */
    float rope_attention;    /* cosines and sines of the main table are multiplied by it */
    uint32_t sliding_window; /* positions that a token sees in a windowed block, its own counted; 0: there is none */
    uint32_t activation;     /* of the gate: MQ_ACTIVATION_... */
    float attention_scale;   /* of the scores */
    float attention_softcap, output_softcap; /* of the scores and the logits; 0: none */
    float embedding_scale;
} mq_hparams;

/* Read and check every key; MQ_ERR_UNSUPPORTED for another version, architecture or layout. */
mq_status mq_hparams_read(const gguf_file *file, mq_hparams *hparams, mq_error *error);

/* *value becomes entry `block` of an optional u32 array with one entry per block, each at most `high`; without the key it
 * stays as it is. */
mq_status mq_hparams_of_block(const gguf_file *file, const char *key, const mq_hparams *hparams, uint32_t block, uint32_t high,
                              uint32_t *value, mq_error *error);

#endif
