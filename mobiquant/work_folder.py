"""The folder of a calibration under way: whose it is, what is kept to go on after a stop, and what goes at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from mobiquant.checkpoint import CONFIG_FILE, INDEX_FILE, OUTER_FILE, CheckpointError, write_json
from mobiquant.config import CalibrationSettings
from mobiquant.source import Source
from runtime.files import remove_leftovers

STATE_FILE = "calibration.json"
BALANCE_FILE = "balance.safetensors"
SENSITIVITY_FILE = "sensitivity.safetensors"
GAINS_FILE = "gains.safetensors"
# Of the work files: raised when what they mean, or the order of work, changes, so that no run goes on from others.
_WORK_VERSION = 2
# Only a run that goes on needs these; a finished folder has none.
_WORK_FILES = (BALANCE_FILE, SENSITIVITY_FILE, GAINS_FILE, "recipe-*.safetensors")


def claim_folder(folder: Path, own: dict[str, object], restart: bool) -> None:
    """Make the folder ours: new or empty, or an earlier run whose fingerprint is `own`. Raises CheckpointError."""
    state = folder / STATE_FILE
    remove_leftovers(folder, STATE_FILE)
    if restart and state.is_file():
        # In this order, so that nobody takes what a killed restart leaves for a checkpoint, or goes on from it.
        (folder / INDEX_FILE).unlink(missing_ok=True)
        write_json(state, {})
        remove_work_files(folder)
        for path in (*folder.glob("block-*.safetensors"), folder / OUTER_FILE, folder / CONFIG_FILE):
            path.unlink(missing_ok=True)
    elif state.is_file():
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{state}: expected readable JSON: {error}; use --restart") from error
        for key, expected in own.items():
            if found.get(key) != expected:
                raise CheckpointError(
                    f"{folder}: holds a calibration with another {key}: expected {expected}, found {found.get(key)}; "
                    "use --restart to begin again"
                )
        return
    elif folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: expected a new or empty folder, found other files")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(state, own)


def remove_work_files(folder: Path) -> None:
    """What only a run that goes on needs."""
    remove_leftovers(folder)
    for path in (path for pattern in _WORK_FILES for path in folder.glob(pattern)):
        path.unlink(missing_ok=True)


def fingerprint(source: Source, text: str, settings: CalibrationSettings) -> dict[str, object]:
    """Everything that decides the result, by the name that an error message gives it."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    own = {"work version": _WORK_VERSION, "model": source.fingerprint(), "text": digest}
    return own | dataclasses.asdict(settings)
