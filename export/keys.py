"""Names of the file's metadata keys and tensors, defined once for Python (docs/format.md).

`runtime/src/keys.h` repeats them for C; `tests/test_keys.py` compares the two.
"""

from __future__ import annotations

FORMAT_VERSION = 1
ALIGNMENT = 64
ARCHITECTURE = "mobiquant"

KEY_ARCHITECTURE = "general.architecture"
KEY_ALIGNMENT = "general.alignment"
KEY_NAME = "general.name"
KEY_FORMAT_VERSION = "mobiquant.format_version"
KEY_BASE_ARCHITECTURE = "mobiquant.base_architecture"
KEY_VOCAB_SIZE = "mobiquant.vocab_size"
KEY_CONTEXT_LENGTH = "mobiquant.context_length"
KEY_EMBEDDING_LENGTH = "mobiquant.embedding_length"
KEY_BLOCK_COUNT = "mobiquant.block_count"
KEY_FEED_FORWARD_LENGTH = "mobiquant.feed_forward_length"
KEY_HEAD_COUNT = "mobiquant.attention.head_count"
KEY_HEAD_COUNT_KV = "mobiquant.attention.head_count_kv"
KEY_HEAD_DIM = "mobiquant.attention.key_length"
KEY_RMS_EPSILON = "mobiquant.attention.layer_norm_rms_epsilon"
KEY_SLIDING_WINDOW = "mobiquant.attention.sliding_window"
KEY_SLIDING_WINDOW_PATTERN = "mobiquant.attention.sliding_window_pattern"
KEY_ROPE_FREQ_BASE = "mobiquant.rope.freq_base"
KEY_ROPE_DIMENSION = "mobiquant.rope.dimension_count"
KEY_SLICE_COUNT = "mobiquant.slice.count"
KEY_SLICE_BITS = "mobiquant.slice.bits"
KEY_GROUP_SIZE = "mobiquant.slice.group_size"
KEY_LAYOUT = "mobiquant.slice.layout"
KEY_EMBEDDING_DEPTH = "mobiquant.embedding.depth"
KEY_OUTPUT_DEPTH = "mobiquant.output.depth"
KEY_ROUTER_HIDDEN = "mobiquant.router.hidden_size"
KEY_ROUTER_BUDGETS = "mobiquant.router.budgets"
KEY_STATIC_ORDER = "mobiquant.static.order"
KEY_TOKENIZER = "tokenizer.huggingface.json"
KEY_CHAT_TEMPLATE = "tokenizer.chat_template"
KEY_BOS_TOKEN = "tokenizer.ggml.bos_token_id"
KEY_ADD_BOS = "tokenizer.ggml.add_bos_token"
KEY_EOS_TOKENS = "tokenizer.eos_token_ids"

TENSOR_EMBEDDING = "token_embd"
TENSOR_OUTPUT = "output"
TENSOR_OUTPUT_NORM = "output_norm.weight"
TENSOR_ROPE = "rope_inv_freq"
TENSOR_ATTN_NORM = "attn_norm.weight"
TENSOR_FFN_NORM = "ffn_norm.weight"

# A router serves the linears that read one input; the order is that of the `depths` the runtime reports.
ROUTER_POINTS: dict[str, tuple[str, ...]] = {
    "attn_in": ("attn_q", "attn_k", "attn_v"),
    "attn_out": ("attn_output",),
    "ffn_in": ("ffn_gate", "ffn_up"),
    "ffn_down": ("ffn_down",),
}
LINEARS: tuple[str, ...] = tuple(name for names in ROUTER_POINTS.values() for name in names)
ROUTER_PARTS = ("hidden", "hidden_scale", "hidden_bias", "head", "head_bias", "threshold")

SUFFIX_SCALE_OFFSET = "scale_offset"


def block_tensor(block: int, name: str) -> str:
    """`blk.3.attn_q` for block 3 and name `attn_q`."""
    return f"blk.{block}.{name}"


def slice_tensor(name: str, slice_index: int) -> str:
    """`NAME.slice1` .. `NAME.slice4`."""
    return f"{name}.slice{slice_index}"


def router_tensor(block: int, point: str, part: str) -> str:
    """`blk.3.router_attn_in.hidden`."""
    return f"blk.{block}.router_{point}.{part}"
