"""A checkpoint becomes a file that holds exactly it, in progressive order, or no file at all."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, models, processors

from export.errors import ExportError
from export.keys import ALIGNMENT, LINEARS
from export.plan import plan_tensors
from export.source import checkpoint_shape
from export.synthetic import SHAPES, SyntheticSource
from export.to_gguf import export_checkpoint
from export.vocab import read_vocabulary
from mobiquant.checkpoint import (
    BLOCK_NORMS,
    OUTER_FILE,
    ROUTER_POINTS,
    CheckpointError,
    block_file,
    block_name,
    finish_checkpoint,
    open_checkpoint,
    write_tensors,
)
from mobiquant.config import QuantizationConfig, RouterConfig
from mobiquant.packing import groups_of, unpack_plane, unpack_scale_offset

ROOT = Path(__file__).parent.parent
HIDDEN, BLOCKS, VOCAB = 3, 2, 45

# Sizes that fill neither tiles nor groups, so that padding shows.
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_size": 136,
    "num_hidden_layers": BLOCKS,
    "intermediate_size": 200,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 34,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
SIZES = {
    "self_attn.q_proj": (136, 136),
    "self_attn.k_proj": (68, 136),
    "self_attn.v_proj": (68, 136),
    "self_attn.o_proj": (136, 136),
    "mlp.gate_proj": (200, 136),
    "mlp.up_proj": (200, 136),
    "mlp.down_proj": (136, 200),
}
HF_NAMES = dict(zip(LINEARS, (name for names in ROUTER_POINTS.values() for name in names), strict=True))

Tensors = dict[str, np.ndarray]


def sliced(random: np.random.Generator, rows: int, columns: int) -> Tensors:
    scales = random.uniform(0.01, 0.02, (rows, groups_of(columns))).astype(np.float16)
    return {
        "codes": random.integers(0, 256, (rows, columns), np.uint8),
        "scales": scales,
        "offsets": (2 * scales).astype(np.float16),
    }


def router(random: np.random.Generator, linears: int, columns: int, budgets: int) -> Tensors:
    return {
        "hidden": random.integers(-127, 128, (HIDDEN, columns), np.int8),
        "hidden_scale": random.uniform(0.001, 0.002, HIDDEN).astype(np.float32),
        "hidden_bias": random.standard_normal(HIDDEN).astype(np.float32),
        "head": random.standard_normal((linears, 3, HIDDEN + 1)).astype(np.float32),
        "head_bias": random.standard_normal((linears, 3)).astype(np.float32),
        "threshold": -np.sort(random.standard_normal((linears, 3, budgets)).astype(np.float32), axis=-1),
    }


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def write_checkpoint(folder: Path, change: Callable[[Tensors], None] = lambda tensors: None, **config: object) -> Path:
    """A random checkpoint; `change` may spoil its tensors, `config` its config.json."""
    random = np.random.default_rng(0)
    quantization = QuantizationConfig(RouterConfig(HIDDEN), embedding_depth=3, output_depth=2)
    tensors: Tensors = {}
    for block in range(BLOCKS):
        for name in BLOCK_NORMS:
            tensors[block_name(block, name)] = random.standard_normal(136).astype(np.float32)
        for name, (rows, columns) in SIZES.items():
            tensors |= prefixed(block_name(block, name), sliced(random, rows, columns))
        for point, names in ROUTER_POINTS.items():
            parts = router(random, len(names), SIZES[names[0]][1], len(quantization.router.budgets))
            tensors |= prefixed(block_name(block, f"router_{point}"), parts)
    tensors |= prefixed("model.embed_tokens", sliced(random, VOCAB, 136))
    tensors |= prefixed("lm_head", sliced(random, VOCAB, 136))
    tensors["model.norm.weight"] = random.standard_normal(136).astype(np.float32)
    tensors["model.rotary_emb.inv_freq"] = (5000.0 ** -(np.arange(17) / 17)).astype(np.float32)
    tensors["static_order"] = np.tile(np.arange(BLOCKS * 7, dtype=np.int32), 3)
    change(tensors)

    folder.mkdir()
    files = [*map(block_file, range(BLOCKS)), OUTER_FILE]
    for index, name in enumerate(files):
        mine = f"model.layers.{index}."
        inside = {key: value for key, value in tensors.items() if key.startswith(mine)}
        outside = {key: value for key, value in tensors.items() if not key.startswith("model.layers.")}
        write_tensors(folder / name, outside if name == OUTER_FILE else inside)
    finish_checkpoint(folder, write_tokenizer(folder), CONFIG | config, quantization, files)
    return folder


def write_tokenizer(folder: Path, **tokenizer_config: object) -> Path:
    source = folder / "source"
    source.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={chr(97 + index): index for index in range(20)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 20)])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"} | tokenizer_config))
    return source


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("export") / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> GGUFReader:
    target = checkpoint.parent / "model.gguf"
    export_checkpoint(checkpoint, target)
    return GGUFReader(target)


def test_file_holds_every_number_of_the_checkpoint(checkpoint: Path, exported: GGUFReader) -> None:
    source = open_checkpoint(checkpoint)
    stored = {tensor.name: tensor.data for tensor in exported.tensors}
    owners = {"token_embd": "model.embed_tokens", "output": "lm_head"}
    for block in range(BLOCKS):
        owners |= {f"blk.{block}.{ours}": block_name(block, theirs) for ours, theirs in HF_NAMES.items()}
    for ours, theirs in owners.items():
        rows, columns = source.tensor(f"{theirs}.codes").shape
        codes = sum(
            unpack_plane(stored.pop(f"{ours}.slice{index}"), rows, columns).astype(int) << (8 - 2 * index)
            for index in (1, 2, 3, 4)
        )
        np.testing.assert_array_equal(codes, source.tensor(f"{theirs}.codes"))
        scales, offsets = unpack_scale_offset(stored.pop(f"{ours}.scale_offset"), rows)
        np.testing.assert_array_equal(scales, source.tensor(f"{theirs}.scales"))
        np.testing.assert_array_equal(offsets, source.tensor(f"{theirs}.offsets"))

    vectors = {"output_norm.weight": "model.norm.weight", "rope_inv_freq": "model.rotary_emb.inv_freq"}
    for block in range(BLOCKS):
        for ours, theirs in zip(("attn_norm.weight", "ffn_norm.weight"), BLOCK_NORMS, strict=True):
            vectors[f"blk.{block}.{ours}"] = block_name(block, theirs)
        for point in ROUTER_POINTS:
            hidden = stored.pop(f"blk.{block}.router_{point}.hidden")
            expected = source.tensor(block_name(block, f"router_{point}.hidden"))
            np.testing.assert_array_equal(hidden[:, : expected.shape[1]], expected)
            assert not hidden[:, expected.shape[1] :].any()
            for part in ("hidden_scale", "hidden_bias", "head", "head_bias", "threshold"):
                vectors[f"blk.{block}.router_{point}.{part}"] = block_name(block, f"router_{point}.{part}")
    order = exported.get_field("mobiquant.static.order").contents()
    np.testing.assert_array_equal(order, source.tensor("static_order"))
    for ours, theirs in vectors.items():
        np.testing.assert_array_equal(stored.pop(ours), source.tensor(theirs))
    assert not stored, "tensors that the checkpoint does not explain"


def test_tensors_come_in_progressive_order_without_gaps(exported: GGUFReader) -> None:
    names = [tensor.name for tensor in exported.tensors]
    linears = [f"blk.{block}.{name}" for block in range(BLOCKS) for name in LINEARS]
    tiers = [max(names.index(f"{name}.slice{index}") for name in linears) for index in (1, 2, 3, 4)]
    starts = [min(names.index(f"{name}.slice{index}") for name in linears) for index in (1, 2, 3, 4)]
    assert all(end < start for end, start in zip(tiers, starts[1:], strict=False))
    # What a cut file needs: everything but the later slices comes before the end of the first tier.
    assert all(names.index(name) < tiers[0] for name in names if ".slice" not in name)
    assert names.index("token_embd.slice3") < starts[0] < tiers[2] < names.index("token_embd.slice4")
    assert names.index("output.slice2") < starts[0] < tiers[1] < names.index("output.slice3")

    end = int(exported.data_offset)
    for tensor in exported.tensors:
        assert tensor.data_offset == end
        end = -(-(end + int(tensor.n_bytes)) // ALIGNMENT) * ALIGNMENT


def test_metadata_repeats_the_configuration(exported: GGUFReader) -> None:
    values = {name: field.contents() for name, field in exported.fields.items()}
    assert values["general.architecture"] == "mobiquant"
    assert values["general.alignment"] == 64
    assert values["mobiquant.format_version"] == 1
    assert values["mobiquant.attention.key_length"] == 34
    assert values["mobiquant.rope.freq_base"] == 5000.0
    assert (values["mobiquant.embedding.depth"], values["mobiquant.output.depth"]) == (3, 2)
    assert len(values["mobiquant.router.budgets"]) == 32
    assert values["tokenizer.ggml.bos_token_id"] == 20
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.eos_token_ids"] == [1]
    assert json.loads(values["tokenizer.huggingface.json"])["model"]["type"] == "BPE"


def test_export_is_reproducible(checkpoint: Path, exported: GGUFReader, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "again.gguf", name="checkpoint")
    assert (tmp_path / "again.gguf").read_bytes() == exported.data.tobytes()


def set_to(name: str, value: float, index: int = 0) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].flat[index] = value

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def cut(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (drop("model.norm.weight"), {}, r"tensor model\.norm\.weight: expected"),
        (cut("lm_head.codes"), {}, r"tensor lm_head\.codes: expected shape \(45, 136\), found \(44, 136\)"),
        (set_to("lm_head.scales", np.inf), {}, r"tensor lm_head\.scales: expected finite numbers, found 1"),
        (set_to("lm_head.scales", 0.0), {}, r"tensor lm_head\.scales: expected numbers above 0"),
        (set_to("model.norm.weight", np.nan), {}, r"tensor model\.norm\.weight: expected finite"),
        (set_to("model.layers.1.router_ffn_in.threshold", 9.0, 5), {}, r"router_ffn_in\.threshold: .*found a rise"),
        (set_to("static_order", 5), {}, r"tensor static_order: expected every linear 3 times, found linear 0 2 times"),
        (set_to("static_order", 14), {}, r"tensor static_order: expected linears 0\.\.13, found 0\.\.14"),
        (cut("static_order"), {}, r"tensor static_order: expected shape \(42,\), found \(41,\)"),
        (None, {"model_type": "gpt2"}, r"model_type: expected one of llama, mistral, .*, found gpt2"),
        (None, {"hidden_size": "wide"}, r"hidden_size: expected a number of type int, found 'wide'"),
        (
            None,
            {"num_key_value_heads": 3},
            r"num_key_value_heads: expected a divisor of num_attention_heads 4, found 3",
        ),
        (None, {"vocab_size": 21}, r"tokenizer\.json: expected token ids below the model's vocab_size 21, found 21"),
        (None, {"eos_token_id": [1, 99]}, r"token id: expected 0\.\.44, found 99"),
    ],
)
def test_bad_checkpoint_is_named_and_leaves_no_file(
    tmp_path: Path, change: Callable[[Tensors], None] | None, config: dict[str, object], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", change or (lambda tensors: None), **config)
    with pytest.raises((ExportError, CheckpointError), match=message):
        export_checkpoint(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_full_disk_keeps_the_old_file_and_leaves_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_text("the old file")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    command = [sys.executable, "-m", "export.to_gguf", str(checkpoint), "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {target}: cannot be written")
    assert done.stderr.count("\n") == 1
    assert target.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [target]


def test_damage_during_writing_is_found_before_the_rename(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import to_gguf

    def write_and_damage(path: Path, *arguments: object) -> None:
        write_file(path, *arguments)
        with path.open("rb+") as file:
            file.seek(-(1 << 12), 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))

    write_file = to_gguf.write_file
    monkeypatch.setattr(to_gguf, "write_file", write_and_damage)
    with pytest.raises(ExportError, match=r"tensor .*: equal bytes: expected True, found False"):
        export_checkpoint(checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": False}}, (20, False, (1,))),
        ({"tokenizer_config.json": {"bos_token": None}}, (None, False, (1,))),
        ({"tokenizer_config.json": {"bos_token": "<s>"}}, (20, True, (1,))),
        # tokenizer.json begins a text with <s>, and with nothing else.
        ({"tokenizer_config.json": {"bos_token": {"content": "</s>"}}}, (21, False, (1,))),
        ({"tokenizer_config.json": {"bos_token": "</s>", "add_bos_token": True}}, (21, True, (1,))),
        ({"config.json": {"bos_token_id": 3, "eos_token_id": [4, 5]}}, (3, False, (4, 5))),
        (
            {"config.json": {"eos_token_id": 4}, "generation_config.json": {"eos_token_id": [6, 7]}},
            (None, False, (6, 7)),
        ),
    ],
)
def test_special_tokens_come_from_the_file_that_decides(
    tmp_path: Path, files: dict[str, dict[str, object]], expected: tuple[int | None, bool, tuple[int, ...]]
) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    for name, content in ({"config.json": {"eos_token_id": 1}} | files).items():
        (folder / name).write_text(json.dumps(content))
    vocabulary = read_vocabulary(folder, VOCAB)
    assert (vocabulary.bos_token, vocabulary.add_bos, vocabulary.eos_tokens) == expected


def test_chat_template_file_wins_over_the_tokenizer_config(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    folder = write_tokenizer(tmp_path, chat_template=templates)
    assert read_vocabulary(folder, VOCAB).chat_template == "named"
    (folder / "chat_template.jinja").write_text("own file")
    assert read_vocabulary(folder, VOCAB).chat_template == "own file"


def test_tied_embedding_has_no_output_tensor_and_is_read_to_the_deeper_depth(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    source.config["tie_word_embeddings"] = True
    names = [tensor.name for tensor in plan_tensors(checkpoint_shape(source))]
    assert not any(name.startswith("output.") for name in names)
    assert names.index("token_embd.slice3") < names.index("blk.0.attn_q.slice1") < names.index("token_embd.slice4")


@pytest.mark.parametrize("name", SHAPES)
def test_synthetic_shapes_have_the_parameters_they_are_named_for(name: str) -> None:
    shape = SHAPES[name]
    SyntheticSource(shape)  # raises when a size leaves padding
    matrices = 1 if shape.tied else 2
    weights = matrices * shape.vocab_size * shape.embedding_length
    weights += shape.block_count * sum(rows * columns for rows, columns in map(shape.linear, LINEARS))
    expected = {
        "llama-3.2-1b": 1_038_614_528,
        "tinyllama-1.1b": 1_099_956_224,
        "llama-3-8b": 8_029_995_008,
        "small-32k": 5_767_168,
        "small-32k-window": 5_767_168,
    }
    assert weights == expected[name]
