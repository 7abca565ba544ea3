"""`pip install .` gives the device side: one wheel for every Python from 3.10, no torch, no demo data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import TINY

from export.to_gguf import export_synthetic

ROOT = Path(__file__).parent.parent
SOURCES = ("mobiquant", "runtime", "export", "setup.py", "pyproject.toml", "LICENSE", "README.md")
CALIBRATION_ONLY = ("torch", "transformers", "safetensors", "gguf", "tqdm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that nothing built before is taken."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        built = shutil.ignore_patterns("*.so", "__pycache__", "_native.c")
        path = ROOT / name
        shutil.copytree(path, source / name, ignore=built) if path.is_dir() else shutil.copy(path, source / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        target,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.iterdir()
    return path


def test_wheel_serves_every_python_from_3_10(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mobiquant", "runtime", "export"}
    assert "runtime/_native.abi3.so" in names
    assert not [
        name
        for name in names
        if "demo" in name or (name.endswith((".c", ".h", ".txt", ".safetensors")) and ".dist-info" not in name)
    ]


def test_wheel_offers_its_model_to_the_evaluation_harness(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "[lm_eval.models]\nmobiquant = mobiquant.evaluation.harness:MobiQuantLM" in archive.read(points).decode()


def test_wheel_needs_no_torch(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    needed = [line for line in archive.read(metadata).decode().splitlines() if line.startswith("Requires-Dist:")]
    plain = {line.split()[1].split(">")[0] for line in needed if "extra ==" not in line}
    assert plain == {"numpy", "cffi", "tokenizers", "jinja2"}
    assert "Requires-Python: >=3.10" in archive.read(metadata).decode()


def test_installed_runtime_runs_a_file_without_the_calibration_packages(wheel: Path, tmp_path: Path) -> None:
    site, model = tmp_path / "site", tmp_path / "random.gguf"
    zipfile.ZipFile(wheel).extractall(site)
    export_synthetic(TINY, model, "random")
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
for name in {CALIBRATION_ONLY!r}:
    sys.modules[name] = None
import runtime
assert runtime.__file__.startswith({str(site)!r}), runtime.__file__
from mobiquant.cli import main
sys.exit(main(["run", "-m", {str(model)!r}, "-p", "hi", "-n", "4", "--avg-bits", "3"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "average bits" in done.stderr


def test_wheel_runs_on_another_python(wheel: Path, tmp_path: Path) -> None:
    other = os.environ.get("MOBIQUANT_OTHER_PYTHON")
    if other is None:
        pytest.skip("set MOBIQUANT_OTHER_PYTHON to another Python from 3.10; the wheel's needs are installed for it")

    def run(*command: object) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(other, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    version = run(python, "-c", "import sys; print(*sys.version_info[:2], sep='.')").strip()
    assert version != f"{sys.version_info[0]}.{sys.version_info[1]}"
    export_synthetic(TINY, tmp_path / "random.gguf", "random")
    command = python.with_name("mobiquant")
    assert f"python   {version}." in run(command, "info")
    assert "average bits" in run(command, "run", "-m", "random.gguf", "-p", "hi", "-n", "4", "--avg-bits", "3")


def test_calibration_without_torch_says_what_to_install(tmp_path: Path) -> None:
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {CALIBRATION_ONLY!r} else find(name, *rest)
from mobiquant.cli import main
sys.exit(main(["calibrate", "model", "-o", "out"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "pip install 'mobiquant[calibrate]'" in done.stderr
    assert done.stderr.count("\n") == 1
