"""The one error of this package: a message of one line that names file, tensor or key, expected and found."""

from __future__ import annotations


class ExportError(Exception):
    """The export cannot go on; no output file was written."""
