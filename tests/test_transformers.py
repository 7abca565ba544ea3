"""A calibrated checkpoint opens with transformers and gives the reference's bits; its tokens are the runtime's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM  # noqa: E402

import mobiquant.transformers  # noqa: E402, F401  (registers the quantizer)
from export.to_gguf import export_checkpoint  # noqa: E402
from mobiquant.reference import open_reference  # noqa: E402
from runtime import Model  # noqa: E402
from runtime.sampling import SamplingSettings  # noqa: E402

TOKENS = np.random.default_rng(6).integers(2, 320, 24)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("bits", [2, 8, 3.0, 4.5])
def test_logits_and_depths_are_the_reference_s(model: Any, tiny_checkpoint: Path, bits: float) -> None:
    reference = open_reference(tiny_checkpoint)
    if isinstance(bits, int):
        model.set_bits(bits)
        reference.set_depth(bits // 2)
    else:
        model.set_avg_bits(bits)
        reference.set_average_bits(bits)
    logits = model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    np.testing.assert_array_equal(logits, reference.logits(TOKENS))
    np.testing.assert_array_equal(model.depths, reference.depths)


def test_generate_gives_the_runtime_s_tokens(model: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    export_checkpoint(tiny_checkpoint, file)
    model.set_avg_bits(3.0)
    prompt = torch.from_numpy(TOKENS)[None]
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(TOKENS) :].tolist()
    with Model(file, avg_bits=3.0) as runtime:
        runtime.tokenizer.eos = frozenset()
        drawn = runtime.generate(TOKENS.tolist(), SamplingSettings(temperature=0))
        assert [token for token, _ in zip(drawn, range(30), strict=False)] == tokens


def test_long_sequence_keeps_to_its_average_as_the_reference_does(model: Any, tiny_checkpoint: Path) -> None:
    """Past the first stretch of the running correction, in one piece and in two with a cache."""
    tokens = np.random.default_rng(7).integers(2, 320, 200)
    reference = open_reference(tiny_checkpoint)
    reference.set_average_bits(3.0)
    expected = reference.logits(tokens)
    model.set_avg_bits(3.0)
    ids = torch.from_numpy(tokens)[None]
    np.testing.assert_array_equal(model(ids).logits[0].numpy(), expected)
    np.testing.assert_array_equal(model.depths, reference.depths)
    first = model(ids[:, :150], use_cache=True)
    second = model(ids[:, 150:], past_key_values=first.past_key_values, logits_to_keep=1)
    np.testing.assert_array_equal(first.logits[0].numpy(), expected[:150])
    np.testing.assert_array_equal(second.logits[0].numpy(), expected[-1:])


def test_padded_prompts_in_a_batch_give_what_each_gives_alone(model: Any) -> None:
    model.set_avg_bits(4.0)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    short, long = torch.from_numpy(TOKENS[:5]), torch.from_numpy(TOKENS)
    batch = torch.stack([torch.cat([torch.zeros(len(long) - len(short), dtype=short.dtype), short]), long])
    mask = torch.ones_like(batch)
    mask[0, : len(long) - len(short)] = 0
    together = model.generate(batch, attention_mask=mask, **options)[:, len(long) :]
    for row, prompt in zip(together, (short, long), strict=True):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), **options)
        assert alone[0, len(prompt) :].tolist() == row.tolist()


def test_padding_on_the_right_is_refused(model: Any) -> None:
    mask = torch.ones(1, len(TOKENS), dtype=torch.int64)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="expected padding on the left alone"):
        model(torch.from_numpy(TOKENS)[None], attention_mask=mask)


def test_bits_outside_the_range_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="bits: expected one of 2, 4, 6, 8, found 3"):
        model.set_bits(3)
    with pytest.raises(ValueError, match="average bits: expected a number from 2 to 8, found 9"):
        model.set_avg_bits(9)


def test_nothing_is_missing_or_left_over(tiny_checkpoint: Path) -> None:
    _, report = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_damaged_quantization_config_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version: expected 1, found 99"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
