"""Every architecture from transformers to the C runtime (architectures.py makes the models). Full precision agrees with
transformers to float32 rounding, C with the torch reference bit for bit; what is not supported is refused by name.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from architectures import CASES, Made, block_logits, exact_logits, make, relative  # noqa: E402
from benchmarks.parity import compare  # noqa: E402
from tiny import TINY  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import mobiquant.transformers  # noqa: E402, F401  (registers the quantizer)
from export.keys import ACTIVATIONS, BASE_ARCHITECTURES  # noqa: E402
from export.shape import ModelShape  # noqa: E402
from export.source import checkpoint_shape  # noqa: E402
from export.to_gguf import export_synthetic  # noqa: E402
from mobiquant.architectures import ARCHITECTURES, UnsupportedModelError, parse_config  # noqa: E402
from mobiquant.checkpoint import open_checkpoint  # noqa: E402
from mobiquant.evaluation.backends import open_backend  # noqa: E402
from mobiquant.reference import open_reference  # noqa: E402
from runtime import MobiQuantError, Model  # noqa: E402
from runtime.native import kernels  # noqa: E402


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Made:
    return make(request.param, tmp_path_factory.mktemp(request.param.name), tiny_text)


def test_blocks_of_calibration_are_transformers_own(made: Made) -> None:
    assert relative(block_logits(made.source, made.tokens), made.expected) < 2e-6


def test_arithmetic_of_the_runtime_is_transformers_own_but_for_the_slices(made: Made) -> None:
    assert relative(exact_logits(made.source, made.tokens), made.expected) < 2e-6


def test_c_gives_the_reference_bits_at_every_budget(made: Made) -> None:
    for result in compare(made.checkpoint, made.file, [made.tokens[:24]], 8, (2, 8, 3.0)):
        assert result.kld == 0.0 and result.unequal == 0 and result.greedy_equal == 8, result


def test_c_at_full_depth_is_near_transformers(made: Made) -> None:
    with Model(made.file) as model:
        model.bits = 8
        logits = model.eval(made.tokens, all_logits=True)
    assert relative(logits, made.expected) < made.case.error


def test_transformers_loads_the_checkpoint_with_the_reference_s_bits(made: Made) -> None:
    reference = open_reference(made.checkpoint)
    reference.set_average_bits(3.0)
    model, report = AutoModelForCausalLM.from_pretrained(made.checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    model.set_avg_bits(3.0)
    ids = torch.from_numpy(made.tokens[:12].astype(np.int64))[None]
    first = model(ids[:, :7], use_cache=True)
    second = model(ids[:, 7:], past_key_values=first.past_key_values)
    logits = np.concatenate([first.logits[0].numpy(), second.logits[0].numpy()])
    np.testing.assert_array_equal(logits, reference.logits(made.tokens[:12]))


def test_full_precision_is_scored_text_after_text_past_its_window(made: Made) -> None:
    """As an evaluation's reference, whose cache is cropped to what the next text begins with."""
    other = np.concatenate([made.tokens[:3], made.tokens[:2:-1]])
    with closing(open_backend(made.source.path)) as backend:
        _, (logits,) = list(backend.predict(other, 1)), list(backend.predict(made.tokens, 1))
    np.testing.assert_allclose(logits, made.expected[:-1], rtol=1e-4, atol=1e-4)


def config_of(model_type: str, **changes: object) -> dict[str, Any]:
    case = next(case for case in CASES if case.model_type == model_type)
    return case.config() | changes


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 30, "long_factor": [2.0] * 30}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of llama, mistral, qwen2, .*gemma3_text, found gpt2"),
        ({"model_type": "qwen3_moe"}, "model_type: expected one of .*, found qwen3_moe"),
        (config_of("qwen3", num_experts=8), "num_experts: expected 0, found 8"),
        (config_of("llama", mlp_bias=True), "mlp_bias: expected False, found True"),
        (config_of("smollm3", mlp_bias=True), "mlp_bias: expected False, found True"),
        (config_of("llama", hidden_act="gelu"), "hidden_act: expected 'silu', found 'gelu'"),
        (
            config_of("gemma2", hidden_activation="gelu"),
            "hidden_activation: expected 'gelu_pytorch_tanh', found 'gelu'",
        ),
        (
            config_of("gemma2", use_bidirectional_attention=True),
            "use_bidirectional_attention: expected False, found True",
        ),
        (config_of("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping: expected None, found 50.0"),
        (config_of("gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar: expected a number above 0, found 0"),
        (config_of("phi3", rope_scaling=LONGROPE), "rope_type: expected one of default, found 'longrope'"),
        (config_of("phi3", rope_scaling={"type": "yarn", "factor": 2.0}), "rope_type: .*, found 'yarn'"),
        (config_of("llama", rope_scaling={"type": "twisted"}), "rope_type: expected one of .*, found 'twisted'"),
        (config_of("llama", partial_rotary_factor=0.5), "partial_rotary_factor: expected 1.0 .*, found 0.5"),
        (config_of("llama", head_dim=35), "head_dim: expected an even number of rotated dimensions, .*found 35"),
        (config_of("qwen2", num_key_value_heads=3), "num_key_value_heads: expected a divisor of .*heads 2, found 3"),
        (config_of("llama", hidden_size="wide"), "hidden_size: expected a number of type int, found 'wide'"),
        (config_of("mistral", layer_types=["full_attention"] * 2), "layer_types: expected all layers of one kind"),
        (config_of("qwen3", layer_types=["sliding_attention"] * 2), "layer_types: expected full_attention alone"),
        (config_of("qwen2", layer_types=["chunked_attention"] * 2), "layer_types: .*, found 'chunked_attention'"),
        (config_of("smollm3", no_rope_layers=[1]), r"no_rope_layers: expected a list of 3 numbers 0 or 1, found \[1\]"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_the_name_of_its_key(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^config.json: {message}"):
        parse_config(content, "config.json")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_key_that_is_left_out_means_what_transformers_takes_it_for(model_type: str) -> None:
    """transformers' own default configuration, whole and without each of its keys; some keys must be there."""
    full = {"head_dim": None} | AutoConfig.for_model(model_type).to_dict()
    spec = parse_config(full, "config.json")
    required = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    required |= {"num_attention_heads", "max_position_embeddings", "rms_norm_eps"}
    for key in full:
        rest = {other: value for other, value in full.items() if other != key}
        if key in required:
            with pytest.raises(UnsupportedModelError, match=key):
                parse_config(rest, "config.json")
        else:
            assert parse_config(rest, "config.json") == spec, key


EVERYTHING = replace(
    TINY,
    base_architecture="gemma3",
    activation="gelu_tanh",
    attention_scale=0.3,
    attention_softcap=2.0,
    output_softcap=3.0,
    embedding_scale=11.3,
    rope_dim=18,
    rope_pattern=(2, 0),
    sliding_window=30,
    sliding_window_pattern=(1, 0),
    qkv_bias=True,
    output_bias=True,
    qk_norm=True,
    post_norms=True,
)


def test_kernels_threads_and_batches_give_the_same_bits_with_every_flag(tmp_path: Path) -> None:
    export_synthetic(EVERYTHING, tmp_path / "all.gguf", "all")
    tokens = np.random.default_rng(2).integers(0, 256, 70)
    with Model(tmp_path / "all.gguf", avg_bits=4.0, kernel="scalar") as model:
        expected = model.eval(tokens, all_logits=True)
    assert np.abs(expected).max() <= 3.0 and np.abs(expected).max() > 0.1
    for kernel, threads, n_batch in (
        (None, 2, 7),
        *((kernel.name, 1, 512) for kernel in kernels() if kernel.supported),
    ):
        with Model(tmp_path / "all.gguf", avg_bits=4.0, kernel=kernel, n_threads=threads, n_batch=n_batch) as model:
            np.testing.assert_array_equal(model.eval(tokens, all_logits=True), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_architecture": "llama5"}, "mobiquant.base_architecture': expected one of llama, .*, found 'llama5'"),
        ({"activation": "relu"}, "mobiquant.hidden_activation': expected one of silu, gelu_tanh, found 'relu'"),
        ({"attention_softcap": -1.0}, "mobiquant.attn_logit_softcapping': expected 0.001 to 1e\\+06, found -1"),
        ({"output_softcap": 1e9}, "mobiquant.final_logit_softcapping': expected 0.001 to 1e\\+06, found 1e\\+09"),
        ({"attention_scale": 0.0}, "mobiquant.attention.scale': expected 1e-06 to 1000, found 0"),
        ({"embedding_scale": float("inf")}, "mobiquant.embedding_scale': expected 1e-06 to 1e\\+06, found inf"),
        ({"rope_pattern": (1, 3)}, "mobiquant.rope.pattern': expected 0 to 2, found 3 for block 1"),
        ({"rope_pattern": (1,)}, "mobiquant.rope.pattern': expected an array of 2 u32, found 1 of type 4"),
        ({"sliding_window": 1 << 21}, "mobiquant.attention.sliding_window': expected 1 to 1048576, found 2097152"),
    ],
)
def test_a_file_with_a_flag_that_the_runtime_does_not_know_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    export_synthetic(replace(TINY, **change), tmp_path / "bad.gguf", "bad")
    with pytest.raises(MobiQuantError, match=f"bad.gguf: key '{message}"):
        Model(tmp_path / "bad.gguf")


def test_the_table_names_what_the_file_and_the_runtime_know() -> None:
    assert tuple(row.name for row in ARCHITECTURES.values()) == BASE_ARCHITECTURES
    specs = [parse_config(case.config(), case.name) for case in CASES]
    assert {spec.activation for spec in specs} == set(ACTIVATIONS)
    assert {case.model_type for case in CASES} == set(ARCHITECTURES)


def test_a_plain_llama_file_has_no_key_of_other_architectures(tiny_checkpoint: Path) -> None:
    shape = checkpoint_shape(open_checkpoint(tiny_checkpoint))
    flags = {item.name for item in fields(ModelShape) if item.default is not MISSING}
    flags -= {"embedding_depth", "output_depth", "static_order", "rope_dim"}
    assert all(getattr(shape, name) == getattr(ModelShape, name) for name in flags)
    assert shape.rope_dim == shape.head_dim
