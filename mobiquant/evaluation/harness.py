"""This project's models under lm-evaluation-harness, as its model `mobiquant`.

    lm_eval --model mobiquant --model_args path=FILE.gguf,bits=3.0 --tasks arc_easy

finds it by the entry point in pyproject.toml from the first release after lm_eval 0.4.13. That release and earlier ones
look for no plugins; there the same command line is `python -m mobiquant.evaluation.harness` instead of `lm_eval`. A
GGUF file needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mobiquant.evaluation.backends import Backend, open_backend
from mobiquant.evaluation.scoring import log_softmax
from runtime.budget import Budget
from runtime.sampling import Sampler, SamplingSettings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_ANY_TOKEN = 0  # stands where a token is predicted and never read


@register_model("mobiquant")
class MobiQuantLM(TemplateLM):
    """A model behind the harness. Requests run one after another: choices that share a beginning share its cache.

    path: GGUF file, checkpoint or full-precision folder. bits: a budget as `mobiquant evaluate --budgets` takes one,
    None for the highest precision. max_length: tokens of context, None for the model's; longer requests lose their
    beginning. threads: of the C runtime. device: where torch runs a folder.
    Raises ValueError, OSError or MobiQuantError when it cannot be opened or has no such budget.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        bits: str | int | float | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        """batch_size, max_batch_size: what the harness passes to every model; without meaning here. backend: an open
        model, instead of a path."""
        super().__init__()
        if backend is None:
            if path is None:
                raise ValueError("model_args: expected path=FILE.gguf or a folder, found no path")
            backend = open_backend(Path(path), device=device or "cpu", n_ctx=max_length or 0, n_threads=threads)
        self._backend = backend
        backend.set_budget(None if bits is None else Budget.parse(str(bits)))

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self._backend.n_ctx

    @property
    def eot_token_id(self) -> int:
        """The first end token; without one, the begin token. Raises ValueError when the model has neither."""
        tokenizer = self._backend.tokenizer
        ends = sorted(tokenizer.eos) or ([] if tokenizer.bos is None else [tokenizer.bos])
        if not ends:
            raise ValueError("tokenizer: expected an end or begin token, found neither")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: the begin token, else the end token."""
        bos = self._backend.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; the begin token comes first where the model wants one, unless `add_special_tokens` is False."""
        return self._backend.tokenizer.encode(string, add_bos=add_special_tokens is not False)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self._backend.tokenizer.decode(tokens)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each whole text, cut into windows of the context that predict every token once."""
        results = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm or None):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, context_len=1
            )
            total = sum(self._score(*make_disjoint_window(window))[0] for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            results.append(total)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, an end token or `max_gen_toks`; greedy unless `do_sample`."""
        results = []
        for request in tqdm(requests, desc="generations", disable=disable_tqdm or None):
            context, arguments = request.args
            results.append(self._generate(context, arguments))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        results = []
        for key, context, continuation in tqdm(requests, desc="choices", disable=disable_tqdm or None):
            results.append(self._score(context, continuation))
            self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log probability of `continuation` after `context`, and whether greedy decoding would give it."""
        if len(continuation) > self.max_length:
            raise ValueError(f"continuation: expected at most {self.max_length} tokens, found {len(continuation)}")
        # The last token is predicted and not read, so one more than the context fits.
        tokens = np.array((context + continuation)[-(self.max_length + 1) :], np.int32)
        first = len(tokens) - len(continuation)
        total, greedy = 0.0, True
        for logits in self._backend.predict(tokens, first):
            targets = tokens[first : first + len(logits), None].astype(np.int64)
            total += float(np.take_along_axis(log_softmax(logits), targets, 1).sum())
            greedy &= bool((logits.argmax(1) == targets[:, 0]).all())
            first += len(logits)
        return total, greedy

    def _generate(self, context: str, arguments: dict[str, Any]) -> str:
        settings = normalize_gen_kwargs(arguments)
        stops = [stop for stop in settings["until"] if stop]
        sampler = Sampler(
            SamplingSettings(
                temperature=settings.get("temperature", 0.0),
                top_k=int(arguments.get("top_k", 0)),
                top_p=float(arguments.get("top_p", 1.0)),
                min_p=0.0,
                seed=0,  # the same answers at every run
            )
        )
        # A short context keeps at least half of itself for the prompt.
        limit = min(settings["max_gen_toks"], self.max_length // 2)
        prompt = self.tok_encode(context)[-(self.max_length - limit) :]
        generated: list[int] = []
        text = ""
        while len(generated) < limit:
            tokens = np.array([*prompt, *generated, _ANY_TOKEN], np.int32)
            (logits,) = self._backend.predict(tokens, len(tokens) - 1)
            token = sampler.sample(logits[0], tokens[:-1].tolist())
            if token in self._backend.tokenizer.eos:
                break
            generated.append(token)
            text = self.tok_decode(generated)
            found = [index for stop in stops if (index := text.find(stop)) >= 0]
            if found:
                return text[: min(found)]
        return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
