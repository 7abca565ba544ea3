"""Every architecture from transformers to the C runtime: a seeded tiny model of sizes that do not divide, calibrated,
exported and run. Full precision agrees with transformers to float32 rounding, C with the torch reference bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from benchmarks.parity import compare  # noqa: E402
from tiny import TINY  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import mobiquant.transformers  # noqa: E402, F401  (registers the quantizer)
from export.keys import ACTIVATIONS, BASE_ARCHITECTURES  # noqa: E402
from export.shape import ModelShape  # noqa: E402
from export.source import checkpoint_shape  # noqa: E402
from export.to_gguf import export_checkpoint, export_synthetic  # noqa: E402
from mobiquant.architectures import ARCHITECTURES, UnsupportedModelError, parse_config  # noqa: E402
from mobiquant.arithmetic import causal_attention, rms_norm, rope_tables  # noqa: E402
from mobiquant.block import soft_capped  # noqa: E402
from mobiquant.calibrate import calibrate  # noqa: E402
from mobiquant.checkpoint import open_checkpoint  # noqa: E402
from mobiquant.config import CalibrationSettings  # noqa: E402
from mobiquant.demo.train import train_tokenizer  # noqa: E402
from mobiquant.exact import run_block  # noqa: E402
from mobiquant.recipes import gains  # noqa: E402
from mobiquant.reference import open_reference  # noqa: E402
from mobiquant.sensitivity import position_embeddings  # noqa: E402
from mobiquant.source import Source, open_source  # noqa: E402
from runtime import MobiQuantError, Model  # noqa: E402
from runtime.native import kernels  # noqa: E402

CONTEXT, VOCAB, TOKENS = 48, 301, 40
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Case:
    """A tiny model. error: relative root mean square of C's logits at 8 bits against transformers', measured and
    rounded up; it is that of int8 activations.
    """

    name: str
    model_type: str
    width: int
    inner: int
    heads: int
    heads_kv: int
    blocks: int = 2
    error: float = 0.08
    recipe: str = "best"
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "vocab_size": VOCAB,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads_kv,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
            "tie_word_embeddings": False,
            **self.settings,
        }


CASES = [
    Case("llama-2", "llama", 96, 133, 3, 3, blocks=1, recipe="paper"),
    Case("llama-3", "llama", 100, 72, 4, 2, settings={"head_dim": 80, "rope_parameters": LLAMA3_ROPE}),
    Case("mistral", "mistral", 144, 200, 4, 1, recipe="paper", settings={"sliding_window": CONTEXT}),
    Case("qwen2", "qwen2", 140, 77, 2, 1, settings={"tie_word_embeddings": True}),
    Case("qwen3", "qwen3", 72, 130, 3, 1, settings={"head_dim": 100}),
    Case("phi3", "phi3", 160, 90, 2, 1, settings={"partial_rotary_factor": 0.75}),
    Case(
        "smollm3", "smollm3", 132, 129, 2, 2, blocks=3, settings={"no_rope_layers": [1, 0, 1], "attention_bias": True}
    ),
    Case(
        "gemma2",
        "gemma2",
        68,
        104,
        2,
        1,
        settings={
            "head_dim": 256,
            "query_pre_attn_scalar": 144,
            "tie_word_embeddings": True,
            "sliding_window": CONTEXT,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    Case(
        "gemma3",
        "gemma3_text",
        100,
        141,
        4,
        2,
        blocks=3,
        settings={
            "head_dim": 66,
            "tie_word_embeddings": True,
            "sliding_window": CONTEXT,
            "sliding_window_pattern": 2,
            "rope_theta": 30000.0,
            "rope_local_base_freq": 500.0,
        },
    ),
]


def make_model(case: Case, folder: Path, text: str) -> None:
    """Save a seeded model, its weights and vectors larger than transformers' own, so that every part of it shows."""
    torch.manual_seed(7)
    config = case.config()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.3))
    model.save_pretrained(folder)
    train_tokenizer(text.split("\n<|endoftext|>\n"), VOCAB).save(str(folder / "tokenizer.json"))


@dataclass(frozen=True)
class Made:
    case: Case
    source: Source
    checkpoint: Path
    file: Path
    tokens: np.ndarray
    expected: np.ndarray  # transformers' logits in float32


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Made:
    case, folder = request.param, tmp_path_factory.mktemp(request.param.name)
    make_model(case, folder / "model", tiny_text)
    source = open_source(str(folder / "model"))
    settings = CalibrationSettings(
        recipe=case.recipe, samples=4, batch=2, seq_len=32, distill_steps=2, distill_batch=1, epochs=1, device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gains, "FIT_STEPS", 10)  # most of the time otherwise
        calibrate(source, folder / "checkpoint", tiny_text, settings)
    read_outer_matrices_whole(folder / "checkpoint" / "config.json")
    export_checkpoint(folder / "checkpoint", folder / "model.gguf")
    tokens = np.random.default_rng(3).integers(2, VOCAB, TOKENS).astype(np.int32)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    return Made(case, source, folder / "checkpoint", folder / "model.gguf", tokens, expected)


def read_outer_matrices_whole(file: Path) -> None:
    """At all four slices, whatever calibration found enough, so that the error is that of depth 4 everywhere."""
    config = json.loads(file.read_text())
    config["quantization_config"] |= {"embedding_depth": 4, "output_depth": 4}
    file.write_text(json.dumps(config))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, of that of what differs within a token."""
    spread = expected - expected.mean(-1, keepdims=True)
    return float(np.sqrt(np.square(found - expected).mean() / np.square(spread).mean()))


@torch.no_grad()
def test_blocks_of_calibration_are_transformers_own(made: Made) -> None:
    source = made.source
    x = source.embed(torch.from_numpy(made.tokens.astype(np.int64))[None])
    positions = position_embeddings(source, TOKENS, torch.device("cpu"))
    for index in range(source.block_count):
        x = source.block(index)(x, position_embeddings=positions)
    logits = source.capped(source.final_norm()(x) @ source.head().T)[0].numpy()
    assert relative(logits, made.expected) < 2e-6


@torch.no_grad()
def test_arithmetic_of_the_runtime_is_transformers_own_but_for_the_slices(made: Made) -> None:
    """The reference's blocks with full-precision linears and keys and values: what is left is the order of sums."""
    source, spec = made.source, made.source.config
    x = source.embed(torch.from_numpy(made.tokens.astype(np.int64)))
    tables = [None, *(rope_tables(frequencies, TOKENS) for frequencies in source.frequencies())]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shared = len(query) // len(key)
        key, value = (part.repeat_interleave(shared, dim=0) for part in (key, value))
        return causal_attention(query, key, value, spec.attention_scale, spec.attention_softcap)

    for index in range(source.block_count):
        x = run_block(source.block(index), x, tables[spec.ropes[index]], attend)
    logits = rms_norm(x, source.final_norm().weight, spec.rms_norm_eps) @ source.head().T
    assert relative(soft_capped(logits, spec.output_softcap).numpy(), made.expected) < 2e-6


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
        (config_of("phi3", rope_scaling=LONGROPE), "rope_type: expected one of default, .*, found 'longrope'"),
        (config_of("llama", rope_scaling={"type": "twisted"}), "rope_type: expected one of .*, found 'twisted'"),
        (config_of("llama", partial_rotary_factor=0.5), "partial_rotary_factor: expected 1.0 .*, found 0.5"),
        (config_of("llama", head_dim=35), "head_dim: expected an even number of rotated dimensions, found 35"),
        (config_of("qwen2", num_key_value_heads=3), "num_key_value_heads: expected a divisor of .*heads 2, found 3"),
        (config_of("llama", hidden_size="wide"), "hidden_size: expected a number of type int, found 'wide'"),
        (config_of("mistral", layer_types=["full_attention"] * 2), "layer_types: expected all layers of one kind"),
        (config_of("qwen2", layer_types=["sliding_attention"] * 2), "layer_types: expected full_attention alone"),
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
