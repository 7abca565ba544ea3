"""A sound structure with values that are none: found by a check of the tensors, or by the tokenizer or template."""

from __future__ import annotations

import re

import numpy as np

from malformed.parts import STRING, Key, Parts, TensorInfo, string, u32
from malformed.registry import malformed
from malformed.tensors import quoted, some_tensor

CORRUPT = "MQ_ERR_CORRUPT"
TOKENIZER = "tokenizer.huggingface.json"


def _put(tensor: TensorInfo, index: int, value: float, kind: type[np.floating]) -> None:
    array = np.frombuffer(tensor.data, kind)
    array[index] = value


def _not_finite(random: np.random.Generator) -> float:
    return float(random.choice([np.nan, np.inf, -np.inf]))


def _spoil_scale(parts: Parts, random: np.random.Generator, value: float, row: int) -> str:
    """row 0: among the scales, 1: among the offsets."""
    tensor = some_tensor(parts, random, "scale_offset")
    pair = int(random.integers(len(tensor.data) // 64))
    _put(tensor, index := pair * 32 + row * 16 + int(random.integers(16)), value, np.float16)
    wanted = "scales of at least 0" if np.isfinite(value) else "finite numbers"
    return rf"{quoted(tensor)}: expected {wanted}, found {_shown(value)} at element {index}"


def _shown(value: float) -> str:
    return "-?nan" if np.isnan(value) else re.escape(f"{value:g}")


@malformed(CORRUPT, "check")
def scale_not_a_number(parts: Parts, random: np.random.Generator) -> str:
    return _spoil_scale(parts, random, float("nan"), 0)


@malformed(CORRUPT, "check")
def scale_infinite(parts: Parts, random: np.random.Generator) -> str:
    return _spoil_scale(parts, random, float(random.choice([np.inf, -np.inf])), 0)


@malformed(CORRUPT, "check")
def scale_negative(parts: Parts, random: np.random.Generator) -> str:
    return _spoil_scale(parts, random, -0.5, 0)


@malformed(CORRUPT, "check")
def offset_not_finite(parts: Parts, random: np.random.Generator) -> str:
    return _spoil_scale(parts, random, _not_finite(random), 1)


def _spoil_f32(parts: Parts, random: np.random.Generator, pattern: str) -> str:
    tensor, value = some_tensor(parts, random, pattern), _not_finite(random)
    _put(tensor, index := int(random.integers(len(tensor.data) // 4)), value, np.float32)
    return rf"{quoted(tensor)}: expected finite numbers, found {_shown(value)} at element {index}"


@malformed(CORRUPT, "check")
def norm_not_finite(parts: Parts, random: np.random.Generator) -> str:
    return _spoil_f32(parts, random, "norm")


@malformed(CORRUPT, "check")
def rotary_frequency_not_finite(parts: Parts, random: np.random.Generator) -> str:
    return _spoil_f32(parts, random, "rope")


@malformed(CORRUPT, "check")
def router_not_finite(parts: Parts, random: np.random.Generator) -> str:
    return _spoil_f32(parts, random, "hidden_scale|hidden_bias|head")


@malformed(CORRUPT, "check")
def threshold_not_finite(parts: Parts, random: np.random.Generator) -> str:
    return _spoil_f32(parts, random, "threshold")


@malformed(CORRUPT, "check")
def threshold_that_rises(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, "threshold")
    row = tensor.dimensions[0]
    index = int(random.integers(1, row)) + row * int(random.integers(len(tensor.data) // 4 // row))
    _put(tensor, index, 1e6, np.float32)
    return rf"{quoted(tensor)}: expected thresholds that never rise with the budget, found 1e\+06 at element {index}"


@malformed(CORRUPT, "check")
def byte_of_a_tensor_changed(parts: Parts, random: np.random.Generator) -> str:
    parts.build()  # the checksums of what was there before
    parts.checksums_follow = False
    tensor = some_tensor(parts, random)
    tensor.data[int(random.integers(len(tensor.data)))] ^= 1 << int(random.integers(8))
    return rf"{quoted(tensor)}: expected checksum [0-9a-f]{{8}}, found [0-9a-f]{{8}}"


@malformed(CORRUPT, "check")
def tensors_exchanged(parts: Parts, random: np.random.Generator) -> str:
    parts.checksums_follow = False
    first, second = parts.tensor("blk.0.ffn_gate.slice1"), parts.tensor("blk.0.ffn_up.slice1")
    first.data, second.data = second.data, first.data
    return rf"{quoted(first)}: expected checksum"


@malformed(CORRUPT, "check")
def byte_of_the_metadata_changed(parts: Parts, random: np.random.Generator) -> str:
    parts.checksums_follow = False
    key = parts.key(str(random.choice(["general.name", TOKENIZER, "mobiquant.rope.freq_base"])))
    value = bytearray(key.value)
    value[-1 - int(random.integers(4))] ^= 1 << int(random.integers(7))
    key.value = bytes(value)
    return "metadata: expected checksum [0-9a-f]{8}, found [0-9a-f]{8}"


# Tokenizer and template


@malformed("ValueError", "tokenizer")
def tokenizer_json_broken(parts: Parts, random: np.random.Generator) -> str:
    text = parts.key(TOKENIZER).value[8:]
    parts.key(TOKENIZER).value = string(text[: int(random.integers(len(text)))])
    return f"{TOKENIZER}: not a tokenizer this version can read"


@malformed("ValueError", "tokenizer")
def tokenizer_json_of_something_else(parts: Parts, random: np.random.Generator) -> str:
    texts = [b"", b"{}", b"[]", b"null", b"7", b'{"model": null}', b'{"model": {"type": "BPE"}}', b"\0" * 99]
    parts.key(TOKENIZER).value = string(texts[int(random.integers(len(texts)))])
    return f"{TOKENIZER}: not a tokenizer this version can read"


@malformed("ValueError", "tokenizer")
def tokenizer_json_nested_without_end(parts: Parts, random: np.random.Generator) -> str:
    depth = int(random.choice([10_000, 1_000_000]))
    parts.key(TOKENIZER).value = string(b'{"model":' + b"[" * depth)
    return f"{TOKENIZER}: not a tokenizer this version can read"


@malformed("ValueError", "tokenizer")
def tokenizer_json_huge(parts: Parts, random: np.random.Generator) -> str:
    parts.key(TOKENIZER).value = string(b'"' + b"a" * (32 << 20) + b'"')
    return f"{TOKENIZER}: not a tokenizer this version can read"


@malformed("ValueError", "tokenizer")
def tokenizer_json_not_utf8(parts: Parts, random: np.random.Generator) -> str:
    text = bytearray(parts.key(TOKENIZER).value[8:])
    at = int(random.integers(len(text)))
    text[at] = 0xFF
    parts.key(TOKENIZER).value = string(bytes(text))
    return f"key '{TOKENIZER}': expected UTF-8, found byte 0xff at {at}"


@malformed("ValueError", "tokenizer")
def tokenizer_missing(parts: Parts, random: np.random.Generator) -> str:
    parts.keys.remove(parts.key(TOKENIZER))
    return f"key {TOKENIZER}: expected the tokenizer, found nothing"


@malformed("ValueError", "template")
def template_broken(parts: Parts, random: np.random.Generator) -> str:
    text = str(
        random.choice(["{% for m in messages %}", "{{ messages", "{% if %}", "{% include 'x' %}", "{{ 1 / 0 }}"])
    )
    parts.keys.insert(0, _template(text.encode()))
    return "chat template"


@malformed("ValueError", "template")
def template_not_utf8(parts: Parts, random: np.random.Generator) -> str:
    parts.keys.insert(0, _template(b"{{ messages }}\xc3"))
    return "key 'tokenizer.chat_template': expected UTF-8, found byte 0xc3 at 14"


@malformed("ValueError", "verify")
def token_outside_the_vocabulary(parts: Parts, random: np.random.Generator) -> str:
    token = int(random.choice([272, 2**31, 2**32 - 1]))
    parts.key("tokenizer.ggml.bos_token_id").value = u32(token)
    return f"key tokenizer.ggml.bos_token_id: expected a token below 272, found {token}"


def _template(text: bytes) -> Key:
    return Key(b"tokenizer.chat_template", STRING, string(text))
