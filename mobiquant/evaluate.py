"""Perplexity of a full-precision folder or a checkpoint, computed by torch with the rules of mobiquant.scoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from mobiquant.checkpoint import is_checkpoint
from mobiquant.reference import ReferenceModel, open_reference
from mobiquant.scoring import Score, default_window, make_windows
from mobiquant.source import load_tokenizer, open_source
from mobiquant.text import clean_text

_FULL_PRECISION_BITS = 32.0


@dataclass(frozen=True)
class Evaluation:
    """What to score. depth: one depth for all tokens; average_bits: routed; static_bits: a depth per linear; all None:
    full depth, or full precision.

    windows: how many windows of the text, None for all.
    """

    rule: str = "all"
    depth: int | None = None
    average_bits: float | None = None
    windows: int | None = None
    context: int | None = None
    static_bits: float | None = None


def evaluate(
    model: Path | str, text: str, evaluation: Evaluation, reference: Path | str | None = None
) -> dict[str, float | int]:
    """Score `model`, a checkpoint or a Hugging Face folder, on `text`; with `reference`, a full-precision folder, also
    against its logits. Returns the keys of `Score.to_dict`. Raises ValueError and its subclasses on unusable input."""
    opened = open_model(model)
    if isinstance(opened, ReferenceModel):
        if evaluation.average_bits is not None:
            opened.set_average_bits(evaluation.average_bits)
        elif evaluation.static_bits is not None:
            opened.set_static_bits(evaluation.static_bits)
        elif evaluation.depth is not None:
            opened.set_depth(evaluation.depth)
    elif (evaluation.depth, evaluation.average_bits, evaluation.static_bits) != (None, None, None):
        raise ValueError(f"{model}: a precision was asked for: expected a calibrated checkpoint, found full precision")
    exact = None if reference is None else reference_logits(reference)
    score, bits, scored = Score(), 0.0, 0
    ids = load_tokenizer(Path(model)).encode(clean_text(text), add_special_tokens=False).ids
    context = evaluation.context or default_window(evaluation.rule, opened.config.max_position_embeddings)
    windows = make_windows(ids, evaluation.rule, context, opened.config.bos_token_id)[: evaluation.windows]
    for window in tqdm(windows, desc="perplexity", unit="window"):
        logits = logits_of(opened, window.tokens)[window.first_scored - 1 : -1]
        expected = None if exact is None else exact(window.tokens)[window.first_scored - 1 : -1]
        score.add(logits, window.targets, expected)
        used = opened.bits_read if isinstance(opened, ReferenceModel) else _FULL_PRECISION_BITS
        bits += used * len(window.tokens)
        scored += len(window.tokens)
    return score.to_dict(bits / scored)


def open_model(path: Path | str) -> ReferenceModel | torch.nn.Module:
    """A checkpoint as the reference model, or another folder in full precision, float32."""
    if is_checkpoint(path):
        return open_reference(path, exact=False)
    folder = open_source(str(path)).path
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_logits(path: Path | str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from tokens int32 [n] to full-precision logits float32 [n, vocab], for any runtime to compare with."""
    model = open_model(path)
    return lambda tokens: logits_of(model, tokens)


@torch.no_grad()
def logits_of(model: ReferenceModel | torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """float32 [n, vocab] for tokens int32 [n]."""
    if isinstance(model, ReferenceModel):
        return model.logits(tokens)
    token_ids = torch.from_numpy(tokens.astype(np.int64))[None]
    return model(token_ids, use_cache=False).logits[0].numpy()
