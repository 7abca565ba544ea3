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
#define MQ_KEY_SLIDING_WINDOW "mobiquant.attention.sliding_window"
#define MQ_KEY_SLIDING_WINDOW_PATTERN "mobiquant.attention.sliding_window_pattern"
#define MQ_KEY_SLICE_COUNT "mobiquant.slice.count"
#define MQ_KEY_SLICE_BITS "mobiquant.slice.bits"
#define MQ_KEY_GROUP_SIZE "mobiquant.slice.group_size"
#define MQ_KEY_LAYOUT "mobiquant.slice.layout"
#define MQ_KEY_EMBEDDING_DEPTH "mobiquant.embedding.depth"
#define MQ_KEY_OUTPUT_DEPTH "mobiquant.output.depth"
#define MQ_KEY_ROUTER_HIDDEN "mobiquant.router.hidden_size"
#define MQ_KEY_ROUTER_BUDGETS "mobiquant.router.budgets"
#define MQ_KEY_STATIC_ORDER "mobiquant.static.order"

#define MQ_TENSOR_EMBEDDING "token_embd"
#define MQ_TENSOR_OUTPUT "output"
#define MQ_TENSOR_OUTPUT_NORM "output_norm.weight"
#define MQ_TENSOR_ROPE "rope_inv_freq"
#define MQ_TENSOR_ATTN_NORM "attn_norm.weight"
#define MQ_TENSOR_FFN_NORM "ffn_norm.weight"
#define MQ_SUFFIX_SCALE_OFFSET "scale_offset"

/* Linears of a block, in the order of the depth record, and the routers (points) that serve them. */
#define MQ_LINEARS 7
#define MQ_LINEAR_NAMES {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
#define MQ_ROUTERS 4
#define MQ_ROUTER_NAMES {"attn_in", "attn_out", "ffn_in", "ffn_down"}
#define MQ_ROUTER_LINEARS {3, 1, 2, 1}

#endif
