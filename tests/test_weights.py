"""Weight files of every usual form give the model's numbers, and unusable ones are refused by name before any work."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from benchmarks import random_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import mobiquant.calibrate as calibration  # noqa: E402
from mobiquant import weights  # noqa: E402
from mobiquant.cli import main  # noqa: E402
from mobiquant.demo.train import Shape  # noqa: E402
from mobiquant.hidden import StatesInMemory, StatesOnDisk  # noqa: E402
from mobiquant.source import Source, open_source  # noqa: E402

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def sharded(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(folder, max_shard_size="300KB")
    shutil.copy(model / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model as several bfloat16 files with an index."""
    return sharded(tiny_model, tmp_path_factory.mktemp("shards"), torch.bfloat16)


@pytest.fixture
def copy(tmp_path: Path, shards: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shards_of_any_float_type_give_the_numbers_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, dtype: torch.dtype
) -> None:
    folder = sharded(tiny_model, tmp_path, dtype)
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    source = open_source(str(folder))
    for index in range(source.block_count):
        for name, value in source.block(index).state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, expected[f"model.layers.{index}.{name}"])
    table = expected["model.embed_tokens.weight"]
    ids = torch.tensor([[5, 319, 5], [0, 127, 128]])
    monkeypatch.setattr(weights, "_ROWS", 128)
    assert torch.equal(source.embed(ids), table[ids])
    assert torch.equal(torch.cat(list(source.pieces("model.embed_tokens.weight"))), table)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def edit_tensors(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    edit_index(folder, lambda files: files.update(dict.fromkeys(tensors, file.name)))


def holder(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def replace(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    edit_tensors(folder, UP, lambda tensors: tensors.update({UP: change(tensors[UP])}))


def pack_to_int4(folder: Path) -> None:
    stem = UP.removesuffix("weight")

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[UP]
        tensors |= {
            f"{stem}qweight": torch.zeros(18, 200, dtype=torch.int32),
            f"{stem}scales": torch.ones(2, 200).half(),
        }

    edit_tensors(folder, UP, pack)
    edit_index(folder, lambda files: files.pop(UP))


def only_pickled(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: holder(f, UP).unlink(), r"expected the \d files of .*index.json, found no model-0000\d-of"),
        (lambda f: (f / INDEX).write_text("{"), "index.json: expected readable JSON"),
        (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), "weight_map: expected tensor names with fi.*found 3"),
        (lambda f: edit_index(f, lambda m: m.update({UP: "../x"})), r"expected files of the folder, found '\.\./x'"),
        (lambda f: edit_index(f, lambda m: m.pop(UP)), f"tensor {UP}: expected, found nothing"),
        (
            lambda f: edit_index(f, lambda m: m.update({UP: m["model.embed_tokens.weight"]})),
            f"tensor {UP}: expected as model.safetensors.index.json says, found it in model-0000",
        ),
        (lambda f: holder(f, UP).write_bytes(holder(f, UP).read_bytes()[:-1]), "expected a whole safetensors file"),
        (lambda f: replace(f, lambda w: w[:9].clone()), rf"{UP}: expected shape \(200, 144\), found \(9, 144\)"),
        (
            lambda f: replace(f, lambda w: w.to(torch.float8_e4m3fn)),
            f"{UP}: expected float32, float16 or bfloat16, found F8_E4M3; a quantized model cannot be calibrated",
        ),
        (
            lambda f: replace(f, lambda w: torch.zeros(200 * 72, 1, dtype=torch.uint8)),
            f"{UP}: expected float32, float16 or bfloat16, found U8",
        ),
        (pack_to_int4, rf"tensor {UP}: expected, found .*mlp.up_proj.qweight \(I32\), .*mlp.up_proj.scales \(F16\)"),
        (only_pickled, "expected .*model.safetensors, found pytorch_model.bin; save the model with transformers'"),
    ],
    ids=[
        "missing shard", "broken index", "no map", "outside", "not in the index", "other shard", "cut shard", "shape",
        "fp8", "bytes", "int4", "pickle",
    ],
)  # fmt: skip
def test_unusable_weight_files_are_refused_by_name(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(weights.WeightError, match=message):
        open_source(str(copy))


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes"])
def test_a_quantized_model_is_refused_by_its_method(
    copy: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(content | {"quantization_config": {"quant_method": method, "bits": 4}})
    )
    assert main(["calibrate", str(copy), "-o", str(copy / "out")]) == 1
    error = capsys.readouterr().err
    assert f"expected full precision, found a quantized model (quant_method {method})" in error
    assert error.count("\n") == 1 and not (copy / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["one more"])
    tokenizer.save(str(copy / "tokenizer.json"))
    assert main(["calibrate", str(copy), "-o", str(copy / "out")]) == 1
    assert "expected token ids below the model's vocab_size 320, found 320" in capsys.readouterr().err


def test_a_tokenizer_model_alone_is_refused_with_the_remedy(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    assert main(["calibrate", str(copy), "-o", str(copy / "out")]) == 1
    error = capsys.readouterr().err
    assert "expected tokenizer.json, found tokenizer.model alone" in error
    assert "AutoTokenizer.from_pretrained" in error


def test_hidden_states_on_disk_and_in_memory_give_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_text: str, tiny_settings, tiny_checkpoint
) -> None:
    source, folder = open_source(str(tiny_model)), tmp_path / "disk"
    # One window at a time, and stopped in the second block: it goes on with hidden states in memory.
    save = calibration._Calibration._save_block

    def stop(self, index: int, *rest: object) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *rest)

    monkeypatch.setattr(calibration._Calibration, "_save_block", stop)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(source, folder, tiny_text, tiny_settings, activations="disk")
    monkeypatch.undo()
    stopped = Path(shutil.copytree(folder, tmp_path / "stopped"))
    for path, activations in ((folder, "disk"), (stopped, "cpu")):
        calibration.calibrate(source, path, tiny_text, tiny_settings, activations=activations)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == {
            file.name: file.read_bytes() for file in tiny_checkpoint.iterdir()
        }


def test_no_two_blocks_of_the_model_are_in_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_text: str, tiny_settings
) -> None:
    read, alive, most = Source.block, weakref.WeakSet(), []

    def block(self: Source, index: int, device: torch.device) -> torch.nn.Module:
        most.append(len(alive))
        found = read(self, index, device)
        alive.add(found)
        return found

    monkeypatch.setattr(Source, "block", block)
    monkeypatch.setattr("mobiquant.recipes.best.fits", lambda *_: False)
    source = open_source(str(tiny_model))
    calibration.calibrate(source, tmp_path / "out", tiny_text, tiny_settings, activations="disk")
    # Once for the balance, twice for the sensitivity, once to calibrate, once for the depths of embedding and head.
    assert most == [0] * (5 * source.block_count)


def test_a_random_model_of_any_size_is_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "_SHARD_BYTES", 1 << 18)
    shape = Shape(vocab=4096, width=128, layers=9, heads=2, kv_heads=1, feed_forward=256, context=64)
    random_model.write_model(tmp_path, random_model.Named(shape, tied=False), blocks=2)
    source = open_source(str(tmp_path))
    assert source.block_count == 2 and len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert source.block(1).mlp.down_proj.weight.std() == pytest.approx(256**-0.5, rel=0.05)
    assert not torch.equal(source.head(), source.embedding())


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_hidden_states_are_what_was_written(tmp_path: Path, kind: str) -> None:
    shape, expected = (5, 3, 7), torch.randn(5, 3, 7)
    states = StatesOnDisk(tmp_path, shape) if kind == "disk" else StatesInMemory(shape, torch.device("cpu"))
    states.write(torch.arange(5), torch.zeros(5, 3, 7))
    states.write(torch.tensor([4, 1]), expected[[4, 1]])
    states.write(torch.tensor([0]), expected[:1].double())
    found = states.read(torch.tensor([0, 1, 4, 1]), "cpu")
    assert torch.equal(found, expected[[0, 1, 4, 1]])
    found.zero_()  # a copy
    assert (
        torch.equal(states.read(torch.tensor([4]), "cpu"), expected[4:])
        and not states.read(torch.tensor([3]), "cpu").any()
    )
    with pytest.raises(IndexError):
        states.read(torch.tensor([5]), "cpu")


def test_a_disk_without_room_for_hidden_states_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"GB for hidden states: .*"):
        StatesOnDisk(tmp_path, (1 << 20, 1 << 16, 1 << 16))
