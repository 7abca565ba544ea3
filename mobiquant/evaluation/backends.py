"""What can be evaluated, behind one interface: a GGUF file, a calibrated checkpoint or a full-precision folder.

Tokens in, logits out, at a budget. The file runs in the C runtime and needs no torch; the folders are opened by
mobiquant.evaluation.torch_backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from runtime.budget import Budget
from runtime.tokens import Tokenizer

_BLOCK = 512  # tokens whose logits are held at once: with a vocabulary of 128 k, 256 MB


class Backend(Protocol):
    """A model that predicts tokens.

    kind: "gguf", "checkpoint" or "full precision". n_ctx: tokens a sequence may have before the last one predicted.
    scale_bits, router_bits: bits per routed weight that scales with offsets, and routers, take beside the slices.
    bits_read: average bits per routed weight of the last prediction, once all of it has been taken.
    """

    kind: str
    tokenizer: Tokenizer
    n_ctx: int
    scale_bits: float
    router_bits: float
    bits_read: float

    def set_budget(self, budget: Budget | None) -> None:
        """Predict at `budget` from an empty cache on; None: at the highest precision there is. Raises ValueError."""

    def predict(self, tokens: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """The logits that predict tokens[first:], float32 [rows, vocab] in blocks of consecutive rows.

        tokens: int32 [n]; 1 <= first < n <= n_ctx + 1. The last token is predicted and never read, so it may be any.
        What an earlier call left in the cache of the same beginning is not computed again.
        """

    def close(self) -> None:
        """Free the model."""


class RuntimeBackend:
    """A GGUF file in the C runtime. n_ctx: 0 for the file's own. n_threads: None for one per physical core. cache_type:
    of keys, of values, as Model takes it."""

    kind = "gguf"

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 0,
        n_threads: int | None = None,
        cache_type: tuple[str, str] = ("f16", "f16"),
        check_tensors: bool = False,
    ) -> None:
        from runtime.model import Model

        self.model = Model(path, n_ctx=n_ctx, n_threads=n_threads, cache_type=cache_type, check_tensors=check_tensors)
        self._highest = self.model.budget
        info = self.model.info
        self.tokenizer = self.model.tokenizer
        self.n_ctx = self.model.n_ctx
        self.scale_bits = 8 * info.scale_bytes / info.routed_weights
        self.router_bits = 8 * info.router_bytes / info.routed_weights
        self.bits_read = float("nan")

    def set_budget(self, budget: Budget | None) -> None:
        self.model.budget = budget or self._highest
        self.model.reset()

    def predict(self, tokens: np.ndarray, first: int) -> Iterator[np.ndarray]:
        model, before, last = self.model, self.model.stats, len(tokens) - 1
        cached = model.reuse(tokens[:first].tolist())
        if cached < first - 1:
            model.eval(tokens[cached : first - 1])
        for start in range(first - 1, last, _BLOCK):
            yield model.eval(tokens[start : min(start + _BLOCK, last)], all_logits=True)
        self.bits_read = (model.stats - before).average_bits

    def close(self) -> None:
        self.model.close()


def open_backend(
    path: Path,
    *,
    device: str = "cpu",
    n_ctx: int = 0,
    n_threads: int | None = None,
    cache_type: tuple[str, str] = ("f16", "f16"),
    check_tensors: bool = False,
) -> Backend:
    """Open a GGUF file, a checkpoint folder or a full-precision folder.

    device: where torch runs a folder. n_ctx: tokens of context, 0 for the model's own. n_threads, cache_type: of the C
    runtime; a folder ignores them. check_tensors: read all of a GGUF file first and refuse it when it is damaged.
    Raises ValueError, OSError or MobiQuantError when it cannot be opened, ImportError when torch is needed and missing.
    """
    if not path.is_dir():
        return RuntimeBackend(
            path, n_ctx=n_ctx, n_threads=n_threads, cache_type=cache_type, check_tensors=check_tensors
        )
    try:
        from mobiquant.evaluation.torch_backends import open_folder
    except ImportError as error:
        raise ImportError(f"{path}: a folder needs torch ({error}): pip install 'mobiquant[calibrate]'") from error
    return open_folder(path, device, n_ctx)


def shared_prefix(cached: list[int], tokens: list[int]) -> int:
    """How many tokens the two sequences have in common from the start."""
    length = 0
    for left, right in zip(cached, tokens, strict=False):
        if left != right:
            break
        length += 1
    return length
