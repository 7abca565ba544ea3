"""The metadata fields of a file, each with its GGUF type, from a ModelShape and a Vocabulary (docs/format.md)."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGUFValueType

from export import keys
from export.shape import ModelShape
from export.vocab import Vocabulary
from mobiquant.packing import GROUP_SIZE, LAYOUT, SLICE_BITS, SLICE_COUNT


@dataclass(frozen=True)
class Field:
    """One key and its value; `item_type` is the type of an array's items."""

    key: str
    value: str | int | float | bool | list[int] | list[float]
    type: GGUFValueType
    item_type: GGUFValueType | None = None


def metadata_fields(name: str, shape: ModelShape, vocabulary: Vocabulary) -> list[Field]:
    """All fields of the file, in file order; optional ones only when they have a value."""
    fields = [
        _string(keys.KEY_ARCHITECTURE, keys.ARCHITECTURE),
        _u32(keys.KEY_ALIGNMENT, keys.ALIGNMENT),
        _string(keys.KEY_NAME, name),
        _u32(keys.KEY_FORMAT_VERSION, keys.FORMAT_VERSION),
        _string(keys.KEY_BASE_ARCHITECTURE, shape.base_architecture),
        _u32(keys.KEY_VOCAB_SIZE, shape.vocab_size),
        _u32(keys.KEY_CONTEXT_LENGTH, shape.context_length),
        _u32(keys.KEY_EMBEDDING_LENGTH, shape.embedding_length),
        _u32(keys.KEY_BLOCK_COUNT, shape.block_count),
        _u32(keys.KEY_FEED_FORWARD_LENGTH, shape.feed_forward_length),
        _u32(keys.KEY_HEAD_COUNT, shape.head_count),
        _u32(keys.KEY_HEAD_COUNT_KV, shape.head_count_kv),
        _u32(keys.KEY_HEAD_DIM, shape.head_dim),
        _f32(keys.KEY_RMS_EPSILON, shape.rms_epsilon),
        _f32(keys.KEY_ROPE_FREQ_BASE, shape.rope_freq_base),
        _u32(keys.KEY_ROPE_DIMENSION, shape.head_dim),
        _u32(keys.KEY_SLICE_COUNT, SLICE_COUNT),
        _u32(keys.KEY_SLICE_BITS, SLICE_BITS),
        _u32(keys.KEY_GROUP_SIZE, GROUP_SIZE),
        _string(keys.KEY_LAYOUT, LAYOUT),
        _u32(keys.KEY_EMBEDDING_DEPTH, shape.embedding_depth),
        _u32(keys.KEY_OUTPUT_DEPTH, shape.output_depth),
        _u32(keys.KEY_ROUTER_HIDDEN, shape.router_hidden),
        Field(keys.KEY_ROUTER_BUDGETS, list(shape.budgets), GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        *_sliding_window(shape),
        *_static_order(shape),
        _string(keys.KEY_TOKENIZER, vocabulary.tokenizer_json),
    ]
    if vocabulary.chat_template:
        fields.append(_string(keys.KEY_CHAT_TEMPLATE, vocabulary.chat_template))
    if vocabulary.bos_token is not None:
        fields.append(_u32(keys.KEY_BOS_TOKEN, vocabulary.bos_token))
        fields.append(Field(keys.KEY_ADD_BOS, vocabulary.add_bos, GGUFValueType.BOOL))
    if vocabulary.eos_tokens:
        eos_tokens = list(vocabulary.eos_tokens)
        fields.append(Field(keys.KEY_EOS_TOKENS, eos_tokens, GGUFValueType.ARRAY, GGUFValueType.UINT32))
    return fields


def _sliding_window(shape: ModelShape) -> list[Field]:
    fields = [_u32(keys.KEY_SLIDING_WINDOW, shape.sliding_window)] if shape.sliding_window else []
    if shape.sliding_window_pattern:
        pattern = list(shape.sliding_window_pattern)
        fields.append(Field(keys.KEY_SLIDING_WINDOW_PATTERN, pattern, GGUFValueType.ARRAY, GGUFValueType.UINT32))
    return fields


def _static_order(shape: ModelShape) -> list[Field]:
    if not shape.static_order:
        return []
    return [Field(keys.KEY_STATIC_ORDER, list(shape.static_order), GGUFValueType.ARRAY, GGUFValueType.UINT32)]


def _string(key: str, value: str) -> Field:
    return Field(key, value, GGUFValueType.STRING)


def _u32(key: str, value: int) -> Field:
    return Field(key, value, GGUFValueType.UINT32)


def _f32(key: str, value: float) -> Field:
    return Field(key, value, GGUFValueType.FLOAT32)
