"""Text files: UTF-8, with a separator line after every document, as calibration and scoring want them."""

from __future__ import annotations

from pathlib import Path

SEPARATOR = "<|endoftext|>"


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises ValueError with the file's name when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error


def clean_text(text: str) -> str:
    """The text without the lines that separate documents, as every scoring rule wants it."""
    return text.replace(f"\n{SEPARATOR}\n", "\n\n").removesuffix(f"\n{SEPARATOR}")
