"""The cost benchmark runs the real calibration and accounts for all of its time."""

from __future__ import annotations

import re
import time

import pytest

pytest.importorskip("torch")
from benchmarks import block_cost

TINY = "--samples 4 --epochs 1 --distill-steps 4 --distill-batch 1 --seq-len 64 --width 128 --heads 2 --kv-heads 1"


def test_phases_are_those_of_the_recipe_and_add_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY.split(), "--feed-forward", "256", "--recipe", "paper", "--device", "cpu", "--blocks", "60"]
    monkeypatch.setattr("sys.argv", ["block_cost", *arguments])
    begin = time.perf_counter()
    assert block_cost.main() == 0
    wall = time.perf_counter() - begin
    rows = re.findall(r"^\| ([a-z ,]+) \| ([\d.]+) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE)
    seconds = {phase: float(value) for phase, value, _ in rows}
    assert {"sensitivity", "base slice", "all slices"} < seconds.keys()
    total = seconds.pop("all")
    assert total == pytest.approx(sum(seconds.values()), abs=0.05 * len(seconds))
    assert 0 < total <= wall
    # Sixty blocks: as many minutes as one block takes seconds, but for what is done once.
    minutes = {phase: float(value) for phase, _, value in rows}
    assert minutes["all slices"] == seconds["all slices"]
