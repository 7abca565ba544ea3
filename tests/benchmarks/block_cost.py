"""What calibration costs at a size for which there is no model here: one block with random weights, by phase.

    python -m tests.benchmarks.block_cost --recipe best --samples 128 --seq-len 2048 --device cuda

Writes a Hugging Face folder of one Llama block (default: the shape of Llama-3-8B) with a small vocabulary, calibrates
it with mobiquant.calibrate, and prints seconds and peak memory of every phase, and the time of a model of many such
blocks. What a large vocabulary adds is not in it. The first step of a stage is counted with what prepares it. Ctrl-C
ends it early, with a table of what was done.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import LlamaForCausalLM

from mobiquant import calibrate as calibration
from mobiquant.config import CalibrationSettings
from mobiquant.demo.train import Shape, model_config, train_tokenizer
from mobiquant.recipes import BlockTask, CalibratedBlock, Recipe
from mobiquant.source import open_source

_VOCABULARY = 1024
_ONCE = "text, embedding"
_REST = "streams between blocks, saving"


@dataclass
class Cost:
    seconds: float = 0.0
    peak_bytes: int = 0


class Clock:
    """Gives the time since the last mark to a phase, with the most GPU memory in use meanwhile."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self.phases: dict[str, Cost] = {}
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """What was done since the last mark belongs to `phase`; what precedes all others is done once for a model."""
        if not self.phases:
            phase = _ONCE
        cost = self.phases.setdefault(phase, Cost())
        if self._cuda:
            torch.cuda.synchronize()
            cost.peak_bytes = max(cost.peak_bytes, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        cost.seconds += now - self._last
        self._last = now

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time given to `phase`, and what came before it to the rest."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.mark(_REST)
            result = function(*args, **kwargs)
            self.mark(phase)
            return result

        return call

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with its phases timed: a stage is what ends with `advance` naming it.

        What it would do with a whole model, where that fits on the device, is left out: one block always fits.
        """

        def run(task: BlockTask) -> CalibratedBlock:
            def advance(stage: str) -> None:
                self.mark(stage)
                task.advance(stage)

            self.mark(_REST)
            result = recipe.run(dataclasses.replace(task, advance=advance))
            self.mark("after the last step")
            return result

        # A model of such blocks does not fit as a whole where this is asked.
        return dataclasses.replace(recipe, run=run, slices=lambda _: None, routers=lambda *_: None)


@contextmanager
def timed_calibration(clock: Clock) -> Iterator[None]:
    """mobiquant.calibrate with its phases marked on the clock."""
    recipes = {name: clock.recipe(recipe) for name, recipe in calibration.recipes().items()}
    sensitivity = clock.timed("sensitivity", calibration.measure_sensitivity)
    balance = clock.timed("balance", calibration.measure_balance)
    with (
        patch.object(calibration, "recipes", lambda: recipes),
        patch.object(calibration, "measure_balance", balance),
        patch.object(calibration, "measure_sensitivity", sensitivity),
        patch.object(calibration, "budget_cuts", clock.timed("thresholds", calibration.budget_cuts)),
    ):
        yield


def write_model(folder: Path, shape: Shape, seed: int) -> str:
    """A Hugging Face folder with random bfloat16 weights; returns a text that its tokenizer reads."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), 4)) for _ in range(4 * shape.vocab)]
    text = " ".join(random.choice(words, 16 * shape.context))
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(model_config(shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    train_tokenizer([text], shape.vocab).save(str(folder / "tokenizer.json"))
    return text


def table(phases: dict[str, Cost], blocks: int) -> str:
    """Markdown: phase, seconds of one block, minutes of the model, peak GiB."""
    rows = [(phase, cost, blocks * cost.seconds if phase != _ONCE else cost.seconds) for phase, cost in phases.items()]
    highest = max(cost.peak_bytes for cost in phases.values())
    total = Cost(sum(cost.seconds for cost in phases.values()), highest)
    rows.append(("all", total, sum(seconds for _, _, seconds in rows)))
    lines = [f"| phase | seconds, one block | minutes, {blocks} blocks | peak GPU GiB |", "| --- | --- | --- | --- |"]
    for phase, cost, seconds in rows:
        peak = f"{cost.peak_bytes / 2**30:.1f}" if highest else ""
        lines.append(f"| {phase} | {cost.seconds:.1f} | {seconds / 60:.1f} | {peak} |")
    return "\n".join(lines)


def main() -> int:
    defaults = CalibrationSettings()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.block_cost", description=__doc__.splitlines()[0])
    for name, value in (("width", 4096), ("heads", 32), ("kv-heads", 8), ("feed-forward", 14336), ("blocks", 32)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help="(%(default)s)")
    parser.add_argument("--recipe", default=defaults.recipe, help="(%(default)s)")
    numbers = [item.name for item in dataclasses.fields(defaults) if isinstance(item.default, int | float)]
    for name in numbers:
        value = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, metavar="N", help="(%(default)s)")
    parser.add_argument("--seq-len", type=int, default=2048, metavar="N", help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(%(default)s)")
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in (*numbers, "recipe", "seq_len", "device")}
    settings = CalibrationSettings(**chosen)
    shape = Shape(_VOCABULARY, options.width, 1, options.heads, options.kv_heads, options.feed_forward, options.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        source, checkpoint = Path(folder, "model"), Path(folder, "checkpoint")
        text = write_model(source, shape, options.seed)
        clock = Clock(options.device)
        interrupted = False
        try:
            with timed_calibration(clock):
                calibration.calibrate(open_source(str(source)), checkpoint, text, settings)
        except KeyboardInterrupt:
            interrupted = True
        clock.mark("what was interrupted" if interrupted else _REST)
    print(table(clock.phases, options.blocks))
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
