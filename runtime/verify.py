"""What is wrong with a file, all of it: structure, checksums, numbers, tokenizer, chat template.

Opening a file stops at the first error of its structure and reads no tensor; this reads everything and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from export.keys import KEY_BOS_TOKEN, KEY_EOS_TOKENS, KEY_TOKENIZER
from runtime.errors import MobiQuantError
from runtime.model import Model
from runtime.native import ModelInfo, NativeModel


def findings(path: Path) -> Iterator[str]:
    """One line for everything that is wrong, each with the file, the key or tensor, what was expected and found."""
    try:
        native = NativeModel(path, allow_partial=True, mmap=True)
    except MobiQuantError as error:
        yield str(error)
        return
    info = native.info()
    if info.file_bytes < info.expected_bytes:
        yield f"{path}: expected {info.expected_bytes} bytes, found {info.file_bytes}: the file was cut"
    yield from _tensors(native, info)
    native.close()
    with Model(path, n_ctx=1, n_threads=1, n_batch=1, allow_partial=True) as model:
        yield from _texts(model)


def _tensors(native: NativeModel, info: ModelInfo) -> Iterator[str]:
    for index in range(info.tensor_count + 1):
        try:
            native.check(index)
        except MobiQuantError as error:
            yield str(error)


def _texts(model: Model) -> Iterator[str]:
    try:
        tokenizer = model.tokenizer
    except ValueError as error:
        yield str(error)
        return
    limit = model.info.vocab_size
    if tokenizer.size > limit:
        yield f"{model.path}: key {KEY_TOKENIZER}: expected at most {limit} tokens, the model's, found {tokenizer.size}"
    ends = [(KEY_EOS_TOKENS, token) for token in sorted(tokenizer.eos)]
    begins = [] if tokenizer.bos is None else [(KEY_BOS_TOKEN, tokenizer.bos)]
    for key, token in (*begins, *ends):
        if token >= limit:
            yield f"{model.path}: key {key}: expected a token below {limit}, found {token}"
    try:
        model.chat.encode([{"role": "user", "content": "Hello"}])
    except ValueError as error:
        yield f"{model.path}: {error}"
