"""Every kind of rope scaling: transformers' numbers in float32, beyond the length that a model was trained with, and
the same bits in the C runtime as in the torch reference.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TINY

torch = pytest.importorskip("torch")
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: E402

from export.to_gguf import export_checkpoint, export_synthetic  # noqa: E402
from mobiquant.architectures import RopeScaling, UnsupportedModelError, parse_config  # noqa: E402
from mobiquant.arithmetic import causal_attention, rms_norm, rope_tables  # noqa: E402
from mobiquant.checkpoint import CONFIG_FILE, OUTER_FILE, ROTARY_FREQUENCIES  # noqa: E402
from mobiquant.exact import run_block  # noqa: E402
from mobiquant.models import rotary_frequencies, transformers_config  # noqa: E402
from mobiquant.reference import open_reference  # noqa: E402
from mobiquant.source import open_source  # noqa: E402
from runtime import MobiQuantError, Model  # noqa: E402

TRAINED, TOKENS = 20, 60
_YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": TRAINED}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": _YARN,
    "yarn-mscale": _YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 16, "beta_slow": 2},
    "yarn-factor": _YARN | {"attention_factor": 1.3, "truncate": False},
}


def configuration(kind: str) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 72,
        "intermediate_size": 90,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": TRAINED,
        "rope_parameters": {"rope_theta": 300.0, **KINDS[kind]},
        "tie_word_embeddings": False,
    }


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Full-precision weights in the runtime's arithmetic. transformers reads token by token: so its dynamic frequencies
    are those of the length so far, and the other kinds do not care."""
    torch.manual_seed(3)
    config = configuration(kind)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(tmp_path)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 101, TOKENS))
    cache, expected = DynamicCache(config=model.config), []
    for token in tokens:
        expected.append(model(token[None, None], past_key_values=cache, use_cache=True).logits[0, -1])

    source = open_source(str(tmp_path))
    spec = source.config
    tables = rope_tables(source.frequencies()[0], TOKENS, spec.rope_scaling)
    x = source.embed(tokens)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (part.repeat_interleave(len(query) // len(key), dim=0) for part in (key, value))
        return causal_attention(query, key, value, spec.attention_scale)

    for index in range(source.block_count):
        x = run_block(source.block(index), x, tables, attend)
    logits = rms_norm(x, source.final_norm().weight, spec.rms_norm_eps) @ source.head().T
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "yarn-mscale"])
def test_c_gives_the_reference_bits_in_any_batches(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    config = json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    parameters = {"rope_theta": 300.0, **KINDS[kind]}
    config |= {"rope_parameters": parameters, "max_position_embeddings": TRAINED}
    (checkpoint / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    spec = parse_config(config, checkpoint)
    outer = load_file(checkpoint / OUTER_FILE)
    outer[ROTARY_FREQUENCIES[0]] = rotary_frequencies(spec, transformers_config(config, checkpoint))[0].numpy()
    save_file(outer, checkpoint / OUTER_FILE)
    export_checkpoint(checkpoint, tmp_path / "scaled.gguf")

    tokens = np.random.default_rng(8).integers(2, 320, TOKENS).astype(np.int32)
    reference = open_reference(checkpoint)
    expected = reference.logits(tokens)
    with Model(tmp_path / "scaled.gguf") as model, Model(tmp_path / "scaled.gguf", n_batch=7) as other:
        assert model.info.context_length == 3 * TRAINED
        np.testing.assert_array_equal(model.eval(tokens, all_logits=True), expected)
        pieces = [other.eval(tokens[:31], all_logits=True)]
        pieces += [other.eval(tokens[i : i + 1], all_logits=True) for i in range(31, TOKENS)]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    config = configuration("linear") | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 300.0}}
    message = "rope_type: expected one of default, linear, dynamic, llama3, yarn, found 'longrope'"
    with pytest.raises(UnsupportedModelError, match=message):
        parse_config(config, "config.json")
    export_synthetic(replace(TINY, rope_scaling=RopeScaling("longrope")), tmp_path / "bad.gguf", "bad")
    message = "'mobiquant.rope.scaling.type': expected one of none, linear, dynamic, llama3, yarn, found 'longrope'"
    with pytest.raises(MobiQuantError, match=message) as caught:
        Model(tmp_path / "bad.gguf")
    assert caught.value.status == "MQ_ERR_UNSUPPORTED"


def test_dynamic_without_a_factor_is_refused(tmp_path: Path) -> None:
    export_synthetic(replace(TINY, rope_scaling=RopeScaling("dynamic", 0.5, 20)), tmp_path / "bad.gguf", "bad")
    with pytest.raises(MobiQuantError, match=r"'mobiquant.rope.scaling.factor': expected 1 to 10000, found 0.5"):
        Model(tmp_path / "bad.gguf")
