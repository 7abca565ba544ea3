/* keys.h: metadata keys and constants of the file, the C copy of export/keys.py and mobiquant/packing.py
 * (tests/test_keys.py holds them together). */
#ifndef MQ_KEYS_H
#define MQ_KEYS_H

#define MQ_FORMAT_VERSION 1
#define MQ_ALIGNMENT 64
#define MQ_ARCHITECTURE "mobiquant"

#define MQ_GROUP_SIZE 128
#define MQ_TILE_ROWS 16
#define MQ_TILE_BYTES 512
#define MQ_SLICE_BITS 2
#define MQ_SLICE_COUNT 4
#define MQ_LAYOUT "tile16x128"

#define MQ_KEY_ARCHITECTURE "general.architecture"
#define MQ_KEY_ALIGNMENT "general.alignment"
#define MQ_KEY_FORMAT_VERSION "mobiquant.format_version"
#define MQ_KEY_BASE_ARCHITECTURE "mobiquant.base_architecture"
#define MQ_KEY_VOCAB_SIZE "mobiquant.vocab_size"
#define MQ_KEY_CONTEXT_LENGTH "mobiquant.context_length"
#define MQ_KEY_EMBEDDING_LENGTH "mobiquant.embedding_length"
#define MQ_KEY_BLOCK_COUNT "mobiquant.block_count"
#define MQ_KEY_FEED_FORWARD_LENGTH "mobiquant.feed_forward_length"
#define MQ_KEY_HEAD_COUNT "mobiquant.attention.head_count"
#define MQ_KEY_HEAD_COUNT_KV "mobiquant.attention.head_count_kv"
#define MQ_KEY_HEAD_DIM "mobiquant.attention.key_length"
#define MQ_KEY_RMS_EPSILON "mobiquant.attention.layer_norm_rms_epsilon"
#define MQ_KEY_ATTENTION_SCALE "mobiquant.attention.scale"
#define MQ_KEY_ATTENTION_SOFTCAP "mobiquant.attn_logit_softcapping"
#define MQ_KEY_OUTPUT_SOFTCAP "mobiquant.final_logit_softcapping"
#define MQ_KEY_SLIDING_WINDOW "mobiquant.attention.sliding_window"
#define MQ_KEY_SLIDING_WINDOW_PATTERN "mobiquant.attention.sliding_window_pattern"
#define MQ_KEY_ROPE_DIMENSION "mobiquant.rope.dimension_count"
#define MQ_KEY_ROPE_PATTERN "mobiquant.rope.pattern"
#define MQ_KEY_ROPE_SCALING "mobiquant.rope.scaling.type"
#define MQ_KEY_ROPE_FACTOR "mobiquant.rope.scaling.factor"
#define MQ_KEY_ROPE_ORIGINAL "mobiquant.rope.scaling.original_context_length"
#define MQ_KEY_ROPE_ATTENTION "mobiquant.rope.scaling.attn_factor"
#define MQ_KEY_ACTIVATION "mobiquant.hidden_activation"
#define MQ_KEY_EMBEDDING_SCALE "mobiquant.embedding_scale"
#define MQ_KEY_SLICE_COUNT "mobiquant.slice.count"
#define MQ_KEY_SLICE_BITS "mobiquant.slice.bits"
#define MQ_KEY_GROUP_SIZE "mobiquant.slice.group_size"
#define MQ_KEY_LAYOUT "mobiquant.slice.layout"
#define MQ_KEY_EMBEDDING_DEPTH "mobiquant.embedding.depth"
#define MQ_KEY_OUTPUT_DEPTH "mobiquant.output.depth"
#define MQ_KEY_ROUTER_HIDDEN "mobiquant.router.hidden_size"
#define MQ_KEY_ROUTER_BUDGETS "mobiquant.router.budgets"
#define MQ_KEY_STATIC_ORDER "mobiquant.static.order"
#define MQ_KEY_CHECKSUMS "mobiquant.checksums"

#define MQ_TENSOR_EMBEDDING "token_embd"
#define MQ_TENSOR_OUTPUT "output"
#define MQ_TENSOR_OUTPUT_NORM "output_norm.weight"
#define MQ_TENSOR_ROPE "rope_inv_freq"
#define MQ_TENSOR_ROPE_LOCAL "rope_inv_freq_swa"
#define MQ_TENSOR_ATTN_NORM "attn_norm.weight"
#define MQ_TENSOR_FFN_NORM "ffn_norm.weight"
#define MQ_TENSOR_ATTN_POST_NORM "post_attention_norm.weight"
#define MQ_TENSOR_FFN_POST_NORM "post_ffw_norm.weight"
#define MQ_TENSOR_Q_NORM "attn_q_norm.weight"
#define MQ_TENSOR_K_NORM "attn_k_norm.weight"
#define MQ_SUFFIX_SCALE_OFFSET "scale_offset"
#define MQ_ROUTER_THRESHOLD "threshold"
#define MQ_SUFFIX_BIAS "bias"

/* Whose forward pass the flags of the file may describe: a file of another one may need a flag that is not known here. */
#define MQ_BASE_ARCHITECTURES {"llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "gemma2", "gemma3"}
/* In the order of MQ_ACTIVATION_SILU and the following (hparams.h). */
#define MQ_ACTIVATIONS {"silu", "gelu_tanh"}
/* In the order of MQ_SCALING_NONE and the following (hparams.h). */
#define MQ_ROPE_SCALINGS {"none", "linear", "dynamic", "llama3", "yarn"}

/* Linears of a block, in the order of the depth record, and the routers (points) that serve them. */
#define MQ_LINEARS 7
#define MQ_BIASES 4 /* the first linears, those of attention, may have one */
#define MQ_LINEAR_NAMES {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
#define MQ_ROUTERS 4
#define MQ_ROUTER_NAMES {"attn_in", "attn_out", "ffn_in", "ffn_down"}
#define MQ_ROUTER_LINEARS {3, 1, 2, 1}

#endif
