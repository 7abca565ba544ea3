"""The first bytes of a file, its counts, and the form of its keys."""

from __future__ import annotations

import re

import numpy as np

from export.limits import MAX_ARRAY, MAX_KEY_NAME, MAX_KEYS, MAX_STRING, MAX_TENSORS
from malformed.parts import ARRAY, BOOL, F32, I32, STRING, U32, U64, Key, Parts, array, string, u32
from malformed.registry import malformed

FORMAT, TRUNCATED, UNSUPPORTED, NOT_GGUF = (
    f"MQ_ERR_{name}" for name in ("FORMAT", "TRUNCATED", "UNSUPPORTED", "NOT_GGUF")
)
NEEDED_U32 = [
    "mobiquant.format_version",
    "mobiquant.vocab_size",
    "mobiquant.context_length",
    "mobiquant.embedding_length",
    "mobiquant.block_count",
    "mobiquant.feed_forward_length",
    "mobiquant.attention.head_count",
    "mobiquant.attention.head_count_kv",
    "mobiquant.attention.key_length",
    "mobiquant.slice.count",
    "mobiquant.slice.bits",
    "mobiquant.slice.group_size",
    "mobiquant.embedding.depth",
    "mobiquant.output.depth",
    "mobiquant.router.hidden_size",
    "general.alignment",
]
NEEDED = [
    *NEEDED_U32,
    "general.architecture",
    "mobiquant.base_architecture",
    "mobiquant.slice.layout",
    "mobiquant.attention.layer_norm_rms_epsilon",
]


def one_of(random: np.random.Generator, *numbers: int) -> int:
    """One of numbers that numpy's integers do not hold."""
    return numbers[int(random.integers(len(numbers)))]


def wrapping(random: np.random.Generator) -> int:
    """A 64-bit number that makes sums or products wrap."""
    return one_of(random, 2**64 - 1, 2**64 - 8, 2**63, 2**63 + 7, 2**62, 2**61 + 1)


# Header


@malformed(NOT_GGUF)
def nothing_at_all(parts: Parts, random: np.random.Generator) -> str:
    parts.cut = 0
    return "expected a GGUF file, found an empty one"


@malformed(NOT_GGUF)
def other_magic(parts: Parts, random: np.random.Generator) -> str:
    parts.magic = bytes(random.choice([b"GGML", b"FUGG", b"PK\x03\x04", b"\x7fELF", b"\0\0\0\0"]))
    return "expected the first bytes 'GGUF'"


@malformed(NOT_GGUF)
def other_version(parts: Parts, random: np.random.Generator) -> str:
    parts.version = int(random.choice([0, 1, 2, 4, 2**31, 2**32 - 1]))
    return f"expected GGUF version 3, found {parts.version}"


@malformed(NOT_GGUF)
def other_byte_order(parts: Parts, random: np.random.Generator) -> str:
    parts.version = 3 << 24
    return "expected GGUF version 3, found 50331648"


@malformed(TRUNCATED)
def cut_in_header(parts: Parts, random: np.random.Generator) -> str:
    parts.cut = int(random.integers(4, 24))
    return "file ends in its header: (version|number of tensors|number of keys) at byte"


@malformed(FORMAT)
def key_count_above_limit(parts: Parts, random: np.random.Generator) -> str:
    parts.key_count = one_of(random, MAX_KEYS + 1, 2**32, wrapping(random))
    return f"header claims {parts.key_count} keys: expected at most {MAX_KEYS}"


@malformed(FORMAT)
def key_count_one_too_many(parts: Parts, random: np.random.Generator) -> str:
    parts.key_count = len(parts.keys) + 1
    return "name of a (key|tensor)"


@malformed(FORMAT)
def key_count_one_too_few(parts: Parts, random: np.random.Generator) -> str:
    parts.key_count = len(parts.keys) - 1
    return f"tensor '{re.escape(parts.keys[-1].name.decode())}': expected 1 to 4 dimensions"


@malformed(FORMAT)
def tensor_count_above_limit(parts: Parts, random: np.random.Generator) -> str:
    parts.tensor_count = one_of(random, MAX_TENSORS + 1, 2**32, wrapping(random))
    return f"header claims {parts.tensor_count} tensors: expected at most {MAX_TENSORS}"


@malformed(FORMAT)
def tensor_count_one_too_many(parts: Parts, random: np.random.Generator) -> str:
    parts.tensor_count = len(parts.tensors) + 1
    return "name of a tensor"


@malformed(FORMAT)
def tensor_count_one_too_few(parts: Parts, random: np.random.Generator) -> str:
    parts.tensor_count = len(parts.tensors) - 1
    return "bytes after the last tensor|expected offset"


@malformed(FORMAT)
def tensor_count_zero(parts: Parts, random: np.random.Generator) -> str:
    parts.tensor_count = 0
    return "bytes after the last tensor"


@malformed(TRUNCATED)
def counts_beyond_the_file(parts: Parts, random: np.random.Generator) -> str:
    if random.integers(2):
        parts.cut = 24 + int(random.integers(13 * len(parts.keys)))
        return f"file ends in its header: {len(parts.keys)} keys"
    parts.key_count, parts.tensor_count = 0, MAX_TENSORS
    parts.cut = 24 + int(random.integers(32 * MAX_TENSORS))
    return f"file ends in its header: {MAX_TENSORS} tensors"


# Form of keys


def some_key(parts: Parts, random: np.random.Generator) -> Key:
    return parts.keys[int(random.integers(len(parts.keys) - 1))]  # the last holds the checksums


@malformed(FORMAT)
def key_name_empty(parts: Parts, random: np.random.Generator) -> str:
    some_key(parts, random).name = b""
    return rf"name of a key at byte \d+: expected 1 to {MAX_KEY_NAME} bytes, found 0"


@malformed(FORMAT)
def key_name_too_long(parts: Parts, random: np.random.Generator) -> str:
    size = MAX_KEY_NAME + int(random.integers(1, 1000))
    some_key(parts, random).name = b"k" * size
    return rf"name of a key at byte \d+: expected 1 to {MAX_KEY_NAME} bytes, found {size}"


@malformed(FORMAT)
def key_name_length_wraps(parts: Parts, random: np.random.Generator) -> str:
    some_key(parts, random).name_length = size = wrapping(random)
    return rf"name of a key at byte \d+: expected 1 to {MAX_KEY_NAME} bytes, found {size}"


@malformed(FORMAT)
def key_name_with_control_characters(parts: Parts, random: np.random.Generator) -> str:
    byte = int(random.choice([0, 9, 10, 27, 32, 127, 128, 155, 255]))
    some_key(parts, random).name += bytes([byte])
    return f"name of a key: expected printable ASCII, found byte 0x{byte:02x}"


@malformed(FORMAT)
def key_twice(parts: Parts, random: np.random.Generator) -> str:
    key = some_key(parts, random)
    parts.keys.insert(int(random.integers(len(parts.keys))), key)
    return f"key '{re.escape(key.name.decode())}' appears twice"


@malformed(FORMAT)
def key_missing(parts: Parts, random: np.random.Generator) -> str:
    name = str(random.choice(NEEDED))
    parts.keys.remove(parts.key(name))
    return f"key '{re.escape(name)}' is missing"


@malformed(FORMAT)
def key_type_unknown(parts: Parts, random: np.random.Generator) -> str:
    key = some_key(parts, random)
    key.type = int(random.choice([13, 14, 255, 2**31, 2**32 - 1]))
    return f"key '{re.escape(key.name.decode())}': expected a value type from 0 to 12, found {key.type}"


@malformed(FORMAT)
def key_of_another_type(parts: Parts, random: np.random.Generator) -> str:
    key = parts.key(str(random.choice(NEEDED_U32)))
    key.type, key.value = [(I32, u32(1)), (F32, u32(1)), (U64, bytes(8)), (BOOL, b"\1")][int(random.integers(4))]
    return f"key '{re.escape(key.name.decode())}': expected u32, found a value of type {key.type}"


@malformed(FORMAT)
def key_with_an_array(parts: Parts, random: np.random.Generator) -> str:
    key = parts.key(str(random.choice(NEEDED_U32)))
    key.type, key.value = ARRAY, array(U32, u32(1) * int(random.integers(0, 3)))
    return f"key '{re.escape(key.name.decode())}': expected u32, found an array of type 4"


@malformed(FORMAT)
def key_with_a_string(parts: Parts, random: np.random.Generator) -> str:
    key = parts.key(str(random.choice(NEEDED_U32)))
    key.type, key.value = STRING, string(b"4")
    return f"key '{re.escape(key.name.decode())}': expected u32, found a value of type 8"


@malformed(FORMAT)
def string_key_with_a_number(parts: Parts, random: np.random.Generator) -> str:
    names = ["general.architecture", "mobiquant.base_architecture", "mobiquant.slice.layout"]
    key = parts.key(str(random.choice(names)))
    key.type, key.value = U32, u32(1)
    return f"key '{re.escape(key.name.decode())}': expected a string, found a value of type 4"


@malformed(TRUNCATED)
def cut_in_a_value(parts: Parts, random: np.random.Generator) -> str:
    ends = 24 + np.cumsum([len(key.build()) for key in parts.keys])
    place = int(random.choice(np.flatnonzero(ends > 32 * len(parts.tensors))[1:-1]))  # before, the counts are too large
    parts.cut = int(ends[place - 1]) + len(parts.keys[place].build()) - 1
    return f"key '{re.escape(parts.keys[place].name.decode())}': the file ends in its value"


@malformed(TRUNCATED)
def string_beyond_the_file(parts: Parts, random: np.random.Generator) -> str:
    key = parts.key(str(random.choice(["general.name", "tokenizer.huggingface.json", "general.architecture"])))
    key.value = string(key.value[8:])
    size = int(random.integers(2**24, MAX_STRING))
    key.value = size.to_bytes(8, "little") + key.value[8:]
    return f"key '{re.escape(key.name.decode())}': the file ends in its value: expected {size} values"


@malformed(FORMAT)
def string_length_wraps(parts: Parts, random: np.random.Generator) -> str:
    key = parts.key(str(random.choice(["general.name", "tokenizer.huggingface.json", "general.architecture"])))
    size = wrapping(random)
    key.value = size.to_bytes(8, "little") + key.value[8:]
    return f"key '{re.escape(key.name.decode())}': expected at most {MAX_STRING} bytes in a string, found {size}"


@malformed(TRUNCATED)
def array_beyond_the_file(parts: Parts, random: np.random.Generator) -> str:
    count = int(random.integers(2**20, MAX_ARRAY))
    parts.key("mobiquant.router.budgets").value = array(F32, b"", count)
    return f"key 'mobiquant.router.budgets': the file ends in its value: expected {count} values of 4 bytes"


@malformed(FORMAT)
def array_length_wraps(parts: Parts, random: np.random.Generator) -> str:
    count = wrapping(random)
    parts.key("mobiquant.router.budgets").value = array(F32, b"", count)
    return f"key 'mobiquant.router.budgets': expected at most {MAX_ARRAY} elements in an array, found {count}"


@malformed(FORMAT)
def array_of_arrays(parts: Parts, random: np.random.Generator) -> str:
    parts.keys.append(Key(b"nested", ARRAY, array(ARRAY, array(U32, u32(1)), int(random.integers(1, 9)))))
    parts.checksums_follow = False
    return "key 'nested': expected a flat array, found elements of type 9"


@malformed(FORMAT)
def array_of_unknown_items(parts: Parts, random: np.random.Generator) -> str:
    kind = int(random.choice([13, 77, 2**32 - 1]))
    parts.key("mobiquant.router.budgets").value = array(kind, b"", 3)
    return f"key 'mobiquant.router.budgets': expected a flat array, found elements of type {kind}"


@malformed(TRUNCATED)
def string_in_an_array_beyond_the_file(parts: Parts, random: np.random.Generator) -> str:
    size = int(random.integers(2**24, MAX_STRING))
    items = string(b"one") + size.to_bytes(8, "little")
    parts.keys.append(Key(b"words", ARRAY, array(STRING, items, 2)))
    return f"key 'words': the file ends in its value: expected {size} values"


@malformed(TRUNCATED)
def more_strings_in_an_array_than_bytes(parts: Parts, random: np.random.Generator) -> str:
    parts.keys.append(Key(b"words", ARRAY, array(STRING, bytes(8) * 3, int(random.integers(2**20, MAX_ARRAY)))))
    parts.cut = 24 + sum(len(key.build()) for key in parts.keys)
    return "length of a string value"


# Identity


@malformed(UNSUPPORTED)
def other_architecture(parts: Parts, random: np.random.Generator) -> str:
    name = str(random.choice(["llama", "mobiquant2", "", "MOBIQUANT"]))
    parts.key("general.architecture").value = string(name.encode())
    return f"key 'general.architecture': expected 'mobiquant', found '{name}'"


@malformed(UNSUPPORTED)
def text_that_a_terminal_would_obey(parts: Parts, random: np.random.Generator) -> str:
    parts.key("general.architecture").value = string(b"\x1b]0;owned\x07\xc2\x9b2J")
    return r"found '\?\]0;owned\?.?\?2J'$"


@malformed(FORMAT)
def other_alignment(parts: Parts, random: np.random.Generator) -> str:
    value = int(random.choice([0, 1, 32, 63, 128, 2**32 - 1]))
    parts.key("general.alignment").value = u32(value)
    return f"key 'general.alignment': expected 64, found {value}"


@malformed(UNSUPPORTED)
def other_format_version(parts: Parts, random: np.random.Generator) -> str:
    value = int(random.choice([0, 99, 2**32 - 1]))
    parts.key("mobiquant.format_version").value = u32(value)
    return f"key 'mobiquant.format_version': expected .*found {value}"


@malformed(UNSUPPORTED)
def other_slices(parts: Parts, random: np.random.Generator) -> str:
    name = str(random.choice(["mobiquant.slice.count", "mobiquant.slice.bits", "mobiquant.slice.group_size"]))
    value = int(random.choice([0, 1, 3, 5, 64, 2**32 - 1]))
    parts.key(name).value = u32(value)
    return f"key '{re.escape(name)}': expected (2|4|128), found {value}"


@malformed(UNSUPPORTED)
def other_layout(parts: Parts, random: np.random.Generator) -> str:
    parts.key("mobiquant.slice.layout").value = string(b"tile8x256")
    return "key 'mobiquant.slice.layout': expected 'tile16x128', found 'tile8x256'"


@malformed(UNSUPPORTED)
def other_base_architecture(parts: Parts, random: np.random.Generator) -> str:
    parts.key("mobiquant.base_architecture").value = string(b"mamba")
    return "key 'mobiquant.base_architecture': expected .*found 'mamba'"
