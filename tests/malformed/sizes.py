"""Hyper-parameters outside their limits or at odds with the tensors; budgets, orders, checksums of a wrong form."""

from __future__ import annotations

import re

import numpy as np

from export import keys, limits
from malformed.header import FORMAT, UNSUPPORTED
from malformed.parts import ARRAY, F32, STRING, U32, Key, Parts, array, f32, string, u32
from malformed.registry import malformed

LIMITS = {
    "mobiquant.vocab_size": limits.MAX_VOCAB_SIZE,
    "mobiquant.context_length": limits.MAX_CONTEXT_LENGTH,
    "mobiquant.embedding_length": limits.MAX_EMBEDDING_LENGTH,
    "mobiquant.block_count": limits.MAX_BLOCK_COUNT,
    "mobiquant.feed_forward_length": limits.MAX_FEED_FORWARD_LENGTH,
    "mobiquant.attention.head_count": limits.MAX_HEAD_COUNT,
    "mobiquant.attention.head_count_kv": limits.MAX_HEAD_COUNT,
    "mobiquant.attention.key_length": limits.MAX_HEAD_DIM,
    "mobiquant.embedding.depth": 4,
    "mobiquant.output.depth": 4,
    "mobiquant.router.hidden_size": limits.MAX_ROUTER_HIDDEN,
}
BUDGETS = "mobiquant.router.budgets"
ORDER = "mobiquant.static.order"


def number(parts: Parts, name: str) -> int:
    return int.from_bytes(parts.key(name).value, "little")


def set_budgets(parts: Parts, values: list[float]) -> None:
    parts.key(BUDGETS).value = array(F32, b"".join(map(f32, values)))


def order_of(parts: Parts) -> np.ndarray:
    return np.frombuffer(parts.key(ORDER).value[12:], np.uint32).copy()


@malformed(UNSUPPORTED)
def hyper_parameter_zero(parts: Parts, random: np.random.Generator) -> str:
    name = str(random.choice(list(LIMITS)))
    parts.key(name).value = u32(0)
    return f"key '{re.escape(name)}': expected [12] to {LIMITS[name]}, found 0"


@malformed(UNSUPPORTED)
def hyper_parameter_above_limit(parts: Parts, random: np.random.Generator) -> str:
    name = str(random.choice(list(LIMITS)))
    value = int(random.choice([LIMITS[name] + 1, 2**31, 2**32 - 1]))
    parts.key(name).value = u32(value)
    return f"key '{re.escape(name)}': expected [12] to {LIMITS[name]}, found {value}"


@malformed(FORMAT)
def heads_that_share_no_key_heads(parts: Parts, random: np.random.Generator) -> str:
    parts.key("mobiquant.attention.head_count_kv").value = u32(3)
    return (
        "expected mobiquant.attention.head_count to be a multiple of mobiquant.attention.head_count_kv, found 4 and 3"
    )


@malformed(FORMAT)
def rotary_dimension_that_does_not_fit(parts: Parts, random: np.random.Generator) -> str:
    value = int(random.choice([3, 31, 33, 34, 1024]))  # of a head of 32
    parts.key(keys.KEY_ROPE_DIMENSION).value = u32(value)
    return f"key '{re.escape(keys.KEY_ROPE_DIMENSION)}': expected an even number .* of at most 32, found {value}"


@malformed(UNSUPPORTED)
def optional_size_outside_its_limits(parts: Parts, random: np.random.Generator) -> str:
    name, value = keys.KEY_SLIDING_WINDOW, int(random.choice([0, limits.MAX_CONTEXT_LENGTH + 1, 2**32 - 1]))
    parts.keys.insert(0, Key(name.encode(), U32, u32(value)))
    return f"key '{re.escape(name)}': expected 1 to {limits.MAX_CONTEXT_LENGTH}, found {value}"


@malformed(FORMAT)
def window_pattern_of_another_length(parts: Parts, random: np.random.Generator) -> str:
    count = int(random.choice([0, 1, 3, 1000]))
    parts.keys.insert(0, Key(keys.KEY_SLIDING_WINDOW.encode(), U32, u32(8)))
    parts.keys.insert(0, Key(keys.KEY_SLIDING_WINDOW_PATTERN.encode(), ARRAY, array(U32, u32(1) * count)))
    return f"key '{re.escape(keys.KEY_SLIDING_WINDOW_PATTERN)}': expected an array of 2 u32, found {count} of type 4"


@malformed(FORMAT)
def factor_outside_its_limits(parts: Parts, random: np.random.Generator) -> str:
    names = [
        keys.KEY_ATTENTION_SCALE,
        keys.KEY_ATTENTION_SOFTCAP,
        keys.KEY_OUTPUT_SOFTCAP,
        keys.KEY_EMBEDDING_SCALE,
        keys.KEY_ROPE_FACTOR,
        keys.KEY_ROPE_ATTENTION,
    ]
    name, value = str(random.choice(names)), float(random.choice([float("nan"), float("inf"), -1.0, 0.0, 1e30]))
    parts.keys.insert(0, Key(name.encode(), F32, f32(value)))
    return rf"key '{re.escape(name)}': expected \S+ to \S+, found -?{re.escape(f'{abs(value):g}')}"


@malformed(UNSUPPORTED)
def choice_that_is_none(parts: Parts, random: np.random.Generator) -> str:
    name = str(random.choice([keys.KEY_ACTIVATION, keys.KEY_ROPE_SCALING]))
    parts.keys.insert(0, Key(name.encode(), STRING, string(b"relu6")))
    return f"key '{re.escape(name)}': expected one of .*, found 'relu6'"


@malformed(FORMAT)
def epsilon_that_is_none(parts: Parts, random: np.random.Generator) -> str:
    value = float(random.choice([float("nan"), float("inf"), -1e-5, 2.0]))
    parts.key("mobiquant.attention.layer_norm_rms_epsilon").value = f32(value)
    return f"key 'mobiquant.attention.layer_norm_rms_epsilon': expected 0 to 1, found -?{re.escape(f'{abs(value):g}')}"


@malformed(FORMAT)
def size_at_odds_with_its_tensors(parts: Parts, random: np.random.Generator) -> str:
    names = ["vocab_size", "embedding_length", "feed_forward_length", "attention.key_length", "router.hidden_size"]
    name = f"mobiquant.{random.choice(names)}"
    parts.key(name).value = u32(number(parts, name) * 2)
    return r"tensor '[\w.]+': expected shape \(.*\), found \(.*\)"


@malformed(FORMAT)
def more_blocks_than_tensors(parts: Parts, random: np.random.Generator) -> str:
    if random.integers(2):
        parts.keys.remove(parts.key(ORDER))
        parts.key("mobiquant.block_count").value = u32(3)
        return "tensor 'blk.2.attn_norm.weight' is missing"
    parts.key("mobiquant.block_count").value = u32(limits.MAX_BLOCK_COUNT)
    return f"key '{ORDER}': expected an array of {3 * 7 * limits.MAX_BLOCK_COUNT} u32, found 42"


@malformed(FORMAT)
def fewer_blocks_than_tensors(parts: Parts, random: np.random.Generator) -> str:
    parts.keys.remove(parts.key(ORDER))
    parts.key("mobiquant.block_count").value = u32(1)
    return r"expected \d+ tensors, found \d+: some belong to no layer"


# Budgets


@malformed(FORMAT)
def budgets_missing(parts: Parts, random: np.random.Generator) -> str:
    parts.keys.remove(parts.key(BUDGETS))
    return f"key '{BUDGETS}': expected an array of 2 to 256 f32, found none"


@malformed(FORMAT)
def budgets_of_another_type(parts: Parts, random: np.random.Generator) -> str:
    if random.integers(2):
        parts.key(BUDGETS).value = array(U32, u32(2) + u32(8))
    else:
        parts.key(BUDGETS).type, parts.key(BUDGETS).value = F32, f32(2)
    return f"key '{BUDGETS}': expected an array of 2 to 256 f32"


@malformed(FORMAT)
def budgets_too_few_or_too_many(parts: Parts, random: np.random.Generator) -> str:
    count = int(random.choice([0, 1, limits.MAX_BUDGETS + 1, 5000]))
    set_budgets(parts, np.linspace(2, 8, count).tolist())
    return f"key '{BUDGETS}': expected an array of 2 to 256 f32"


@malformed(FORMAT)
def budgets_that_do_not_ascend(parts: Parts, random: np.random.Generator) -> str:
    values = np.linspace(2, 8, 9)
    values[int(random.integers(1, 8))] = random.choice([float("nan"), 1.0, 9.0, 8.0, float("inf")])
    set_budgets(parts, values.tolist())
    return f"key '{BUDGETS}': expected values that ascend from 2 to 8"


@malformed(FORMAT)
def budgets_with_other_ends(parts: Parts, random: np.random.Generator) -> str:
    ends = [(1, 8), (2, 9), (float("nan"), 8), (2, float("inf")), (8, 2)][int(random.integers(5))]
    set_budgets(parts, [ends[0], 4.0, ends[1]])
    return f"key '{BUDGETS}': expected values that ascend from 2 to 8"


@malformed(FORMAT)
def budgets_of_another_number_than_thresholds(parts: Parts, random: np.random.Generator) -> str:
    count = int(random.choice([2, 3, 200]))
    set_budgets(parts, np.linspace(2, 8, count).tolist())
    return r"tensor 'blk\.0\.router_attn_in\.threshold': expected shape \(1, 3, 3, " + str(count)


# Static order


@malformed(FORMAT)
def static_order_of_another_form(parts: Parts, random: np.random.Generator) -> str:
    order = order_of(parts)
    kind = int(random.integers(3))
    if kind == 0:
        parts.key(ORDER).type, parts.key(ORDER).value = U32, u32(1)
    elif kind == 1:
        parts.key(ORDER).value = array(F32, order.astype(np.float32).tobytes())
    else:
        parts.key(ORDER).value = array(U32, order[: int(random.integers(len(order)))].tobytes())
    return f"key '{ORDER}': expected an array of 42 u32, found"


@malformed(FORMAT)
def static_order_with_a_linear_that_is_not_there(parts: Parts, random: np.random.Generator) -> str:
    order = order_of(parts)
    order[int(random.integers(len(order)))] = value = int(random.choice([14, 255, 2**32 - 1]))
    parts.key(ORDER).value = array(U32, order.tobytes())
    return f"key '{ORDER}': expected linears below 14, found {value}"


@malformed(FORMAT)
def static_order_with_a_linear_too_often(parts: Parts, random: np.random.Generator) -> str:
    order = order_of(parts)
    place = int(random.integers(len(order)))
    order[place] = linear = (order[place] + 1) % 14
    parts.key(ORDER).value = array(U32, order.tobytes())
    return f"key '{ORDER}': expected every linear 3 times, found linear {linear} more often"


# Checksums


@malformed(FORMAT)
def checksums_of_another_number(parts: Parts, random: np.random.Generator) -> str:
    count = int(random.choice([0, 1, len(parts.tensors), len(parts.tensors) + 2]))
    parts.key("mobiquant.checksums").value = array(U32, bytes(4 * count))
    parts.checksums_follow = False
    return f"key 'mobiquant.checksums': expected an array of {len(parts.tensors) + 1} u32, found {count} of type 4"


@malformed(FORMAT)
def checksums_of_another_type(parts: Parts, random: np.random.Generator) -> str:
    key = parts.key("mobiquant.checksums")
    key.type, key.value = [(U32, u32(7)), (ARRAY, array(F32, bytes(4)))][int(random.integers(2))]
    parts.checksums_follow = False
    return f"key 'mobiquant.checksums': expected an array of {len(parts.tensors) + 1} u32, found 1 of type"
