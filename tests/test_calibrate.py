"""From a model folder to a checkpoint: what it holds, resuming, the reference model, refusals, the demo's trainer."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scores import score

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

import mobiquant.calibrate as calibration  # noqa: E402
from mobiquant import work_folder  # noqa: E402
from mobiquant.checkpoint import LINEARS, CheckpointError, open_checkpoint  # noqa: E402
from mobiquant.cli import main  # noqa: E402
from mobiquant.data import calibration_windows  # noqa: E402
from mobiquant.demo import train  # noqa: E402
from mobiquant.recipes import best, distill, gains, route  # noqa: E402
from mobiquant.reference import open_reference  # noqa: E402
from mobiquant.source import open_source  # noqa: E402


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt_at_block(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Make the calibration of block `stop` raise what Ctrl-C raises."""
    prepare = calibration._Calibration._task

    def task(self, index, *rest):
        if index == stop:
            raise KeyboardInterrupt
        return prepare(self, index, *rest)

    monkeypatch.setattr(calibration._Calibration, "_task", task)


def test_checkpoint_holds_every_tensor_in_its_form(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    hidden = checkpoint.quantization.router.hidden_size
    assert checkpoint.tensor("model.layers.1.mlp.down_proj.codes", np.uint8, (144, 200)).max() > 200
    assert np.isfinite(checkpoint.tensor("model.layers.1.mlp.down_proj.scales", np.float16, (144, 2))).all()
    checkpoint.tensor("model.layers.0.router_attn_in.hidden", np.int8, (hidden, 144))
    checkpoint.tensor("model.layers.0.router_ffn_in.head", np.float32, (2, 3, hidden + 1))
    threshold = checkpoint.tensor("model.layers.0.router_attn_in.threshold", np.float32, (3, 3, 32))
    assert np.isfinite(threshold).all() and (np.diff(threshold) <= 0).all()
    checkpoint.tensor("model.rotary_emb.inv_freq", np.float32, (18,))
    assert not checkpoint.has("lm_head.codes")
    assert sorted(checkpoint.tensor("static_order", np.int32, (3 * 14,))) == sorted([*range(14)] * 3)
    assert len(checkpoint.names()) == 2 * (7 * 3 + 4 * 6 + 2) + 3 + 1 + 1 + 1


def test_interrupted_and_resumed_run_gives_the_same_bytes(
    tmp_path, monkeypatch, tiny_model, tiny_text, tiny_settings, tiny_checkpoint
):
    folder, source = tmp_path / "resumed", open_source(str(tiny_model))
    interrupt_at_block(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(source, folder, tiny_text, tiny_settings)
    monkeypatch.undo()
    assert [path.name for path in folder.glob("block-*")] == ["block-00000.safetensors"]
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder, found no config\.json"):
        open_checkpoint(folder)
    calibration.calibrate(source, folder, tiny_text, tiny_settings)
    assert contents(folder) == contents(tiny_checkpoint)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def best_settings(request, tiny_settings):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    return dataclasses.replace(tiny_settings, recipe="best", distill_steps=40, distill_batch=4, device=request.param)


@pytest.fixture(scope="module")
def best_checkpoint(tmp_path_factory, tiny_model, tiny_text, best_settings) -> Path:
    folder = tmp_path_factory.mktemp("best") / "checkpoint"
    calibration.calibrate(open_source(str(tiny_model)), folder, tiny_text, best_settings)
    return folder


@pytest.mark.parametrize("fits", [True, False], ids=["whole model", "block by block"])
def test_recipe_best_lowers_the_divergence_at_2_bits(
    tmp_path, monkeypatch, tiny_model, tiny_text, best_settings, best_checkpoint, fits
):
    folders = {"best": best_checkpoint, "paper": tmp_path / "paper"}
    source = open_source(str(tiny_model))
    calibration.calibrate(source, folders["paper"], tiny_text, dataclasses.replace(best_settings, recipe="paper"))
    if not fits:
        folders["best"] = tmp_path / "best"
        monkeypatch.setattr(best, "fits", lambda *_: False)
        calibration.calibrate(source, folders["best"], tiny_text, best_settings)
    found = {name: score(path, tiny_text, "2", tiny_model).score.kld for name, path in folders.items()}
    assert found["best"] < 0.9 * found["paper"]


def test_three_interruptions_at_any_step_change_no_byte(
    tmp_path, monkeypatch, tiny_model, tiny_text, best_settings, best_checkpoint
):
    source, folder = open_source(str(tiny_model)), tmp_path / "resumed"
    for module in (distill, route):
        monkeypatch.setattr(module, "_SAVE_EVERY", 3)
    step = torch.optim.AdamW.step
    counts: list[int] = []

    def stopping_step(self, *args, **kwargs):
        counts[0] -= 1
        if counts[0] < 0:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stopping_step)
    slices, fits = sum(distill.slice_steps(best_settings)), 4 * gains.FIT_STEPS
    random = np.random.default_rng(4)
    in_slices = int(random.integers(4, slices))
    # Then in the second block's routers, and in the routers of the whole model; a few steps are taken again.
    in_block = slices - in_slices + fits + int(random.integers(10, fits - 10))
    in_routers = fits + int(random.integers(4, 20))
    for count in (in_slices, in_block, in_routers):
        counts[:] = [count]
        with pytest.raises(KeyboardInterrupt):
            calibration.calibrate(source, folder, tiny_text, best_settings)
    counts[:] = [1 << 30]
    calibration.calibrate(source, folder, tiny_text, best_settings)
    assert contents(folder) == contents(best_checkpoint)


def test_other_settings_are_refused_until_restart(
    tmp_path, monkeypatch, tiny_model, tiny_text, tiny_settings, tiny_checkpoint
):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    other = dataclasses.replace(tiny_settings, seed=7)
    with pytest.raises(CheckpointError, match="another seed: expected 7, found 0; use --restart"):
        calibration.calibrate(open_source(str(tiny_model)), folder, tiny_text, other)
    with pytest.raises(CheckpointError, match="another text"):
        calibration.calibrate(open_source(str(tiny_model)), folder, tiny_text + "more", tiny_settings)
    monkeypatch.setattr(work_folder, "_WORK_VERSION", 99)
    with pytest.raises(CheckpointError, match="another work version: expected 99, found 2"):
        calibration.calibrate(open_source(str(tiny_model)), folder, tiny_text, tiny_settings)
    monkeypatch.undo()
    assert contents(folder) == contents(tiny_checkpoint)
    interrupt_at_block(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(open_source(str(tiny_model)), folder, tiny_text, other, restart=True)
    assert not list(folder.glob("block-*")) and not (folder / "config.json").exists()


def test_run_killed_before_its_claim_can_be_repeated(tmp_path, monkeypatch, tiny_model, tiny_text, tiny_settings):
    (tmp_path / f".calibration.json.{os.getpid()}.tmp").write_text("{")
    interrupt_at_block(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(open_source(str(tiny_model)), tmp_path, tiny_text, tiny_settings)
    assert "calibration.json" in contents(tmp_path) and not list(tmp_path.glob(".*"))


def test_run_stopped_at_its_very_end_still_has_what_it_goes_on_from(
    tmp_path, monkeypatch, tiny_model, tiny_text, tiny_settings, tiny_checkpoint
):
    def stop(*_):
        raise KeyboardInterrupt

    folder, source = tmp_path / "checkpoint", open_source(str(tiny_model))
    monkeypatch.setattr(calibration, "finish_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(source, folder, tiny_text, tiny_settings)
    assert (folder / "sensitivity.safetensors").is_file()
    monkeypatch.undo()
    (folder / f".block-00000.safetensors.{os.getpid()}.tmp").touch()  # of a process that was killed
    calibration.calibrate(source, folder, tiny_text, tiny_settings)
    assert contents(folder) == contents(tiny_checkpoint)


def test_restart_stopped_half_way_is_no_checkpoint_and_is_not_gone_on_from(
    tmp_path, monkeypatch, tiny_model, tiny_text, tiny_settings, tiny_checkpoint
):
    folder, source = tmp_path / "copy", open_source(str(tiny_model))
    shutil.copytree(tiny_checkpoint, folder)
    unlink, left = Path.unlink, [2]

    def stopping_unlink(path, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", stopping_unlink)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(source, folder, tiny_text, dataclasses.replace(tiny_settings, seed=3), restart=True)
    monkeypatch.undo()
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="use --restart"):
        calibration.calibrate(source, folder, tiny_text, tiny_settings)


def test_foreign_folder_is_left_alone(tmp_path, tiny_model, tiny_text, tiny_settings):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        calibration.calibrate(open_source(str(tiny_model)), tmp_path, tiny_text, tiny_settings, restart=True)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


def test_reference_nears_full_precision_with_depth(tiny_checkpoint, tiny_model):
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    reference, tokens = open_reference(tiny_checkpoint, exact=False), np.arange(40, dtype=np.int32)
    with torch.no_grad():
        expected = exact(torch.from_numpy(tokens).long()[None]).logits[0].numpy()
    errors = []
    for depth in (1, 2, 3, 4):
        reference.set_depth(depth)
        errors.append(np.square(reference.logits(tokens) - expected).mean())
        assert (reference.depths == depth).all() and reference.bits_read == pytest.approx(2 * depth)
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > errors[3]


def test_routed_reference_spends_about_the_budget(tiny_checkpoint, tiny_model, tiny_text, tiny_settings):
    reference, source = open_reference(tiny_checkpoint, exact=False), open_source(str(tiny_model))
    held_out = calibration_windows(tiny_text, source.tokenizer(), 0, 8, tiny_settings.seq_len, 0).held_out
    for bits in (3.0, 4.5, 6.0):
        reference.set_average_bits(bits)
        spent = []
        for window in held_out:
            reference.logits(window)
            spent.append(reference.bits_read)
            assert reference.depths.shape == (len(window), 2, len(LINEARS)) and reference.depths.dtype == np.uint8
        assert np.mean(spent) == pytest.approx(bits, abs=0.25)


def test_budget_ends_equal_uniform_depths(tiny_checkpoint):
    reference, tokens = open_reference(tiny_checkpoint, exact=False), np.arange(30, dtype=np.int32)
    for bits, depth in ((2, 1), (8, 4)):
        reference.set_average_bits(bits)
        routed = reference.logits(tokens)
        reference.set_depth(depth)
        np.testing.assert_array_equal(routed, reference.logits(tokens))


def test_reference_refuses_bad_precisions(tiny_checkpoint):
    reference = open_reference(tiny_checkpoint, exact=False)
    for call, message in (
        (lambda: reference.set_depth(5), "depth: expected 1..4, found 5"),
        (lambda: reference.set_average_bits(1.9), "average bits: expected 2..8, found 1.9"),
        (lambda: reference.set_output_depth(5), "output depth: expected 0..4, found 5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "expected a finished calibration"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda folder: (folder / "config.json").write_text("{}"), "quantization_config: expected, found nothing"),
        (lambda folder: (folder / "outer.safetensors").unlink(), "expected a file in the folder"),
        (lambda folder: (folder / "outer.safetensors").write_bytes(b"\0" * 40), "cannot be read"),
        (lambda folder: edit_config(folder, slice_bits=[2, 2]), r"slice_bits: expected \[2, 2, 2, 2\], found \[2, 2\]"),
        (lambda folder: edit_config(folder, format_version=2), "format_version: expected 1, found 2"),
        (lambda folder: edit_config(folder, router={"hidden_size": 17}), "router.budgets: expected"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, tiny_checkpoint, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        open_reference(folder)


def edit_config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(content))


def test_full_disk_leaves_no_half_written_file(tmp_path):
    code = (
        "import resource, sys, numpy as np; from pathlib import Path; from mobiquant.checkpoint import write_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_tensors(Path(sys.argv[1]) / 'block.safetensors', {'x': np.zeros(100_000, np.uint8)})"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "CheckpointError" in result.stderr and "block.safetensors: cannot be written" in result.stderr
    assert not list(tmp_path.iterdir())


def test_command_line_reports_one_line_per_error(tmp_path, capsys, tiny_model, tiny_checkpoint):
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    folder = str(tmp_path / "out")
    for arguments, message in (
        (["calibrate", str(tmp_path), "-o", folder], "config.json"),
        (["calibrate", str(tiny_checkpoint), "-o", folder], "expected full precision, found a quantized model"),
        (["calibrate", str(tiny_model), "-o", folder, "--text", str(text)], "text: expected at least"),
        (["calibrate", str(tiny_model), "-o", folder, "--text", str(tmp_path / "no.txt")], "no.txt"),
        (["calibrate", str(tiny_model), "-o", folder, "--seq-len", "65"], "context 64, found 65"),
        (["calibrate", str(tiny_model), "-o", folder, "--recipe", "best2"], "recipe: expected one of best, paper"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path(folder).exists()


def test_trainer_writes_a_model_that_can_be_calibrated(tmp_path, tiny_text):
    shape = train.Shape(vocab=300, width=32, layers=1, heads=2, kv_heads=1, feed_forward=48, context=32)
    folder = tmp_path / "trained"
    schedule = train.Schedule(steps=12, batch=4, warmup=2)
    loss = train.train(tiny_text, folder, shape, schedule, torch.device("cpu"))
    assert loss < 0.9 * np.log(300)
    source = open_source(str(folder))
    assert source.tokenizer().encode("a").ids[0] == 0
    assert source.block(0).mlp.up_proj.weight.shape == (48, 32)
