"""Writing a file so that a reader never finds half of it, whatever ends the writer: an error, a full disk, a signal."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds and removed when it does not.

    What an earlier writer of `path` left when it was killed is removed too. Raises OSError that names `path`.
    """
    remove_leftovers(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Make `data` the content of the file at `path`, or leave it as it was. Raises OSError that names `path`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of processes that no longer live: those for the file `name` in `folder`, or all in it."""
    for path in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        # A process with our own number was one before us: we have not begun to write.
        if match and (int(match[1]) == os.getpid() or not _lives(int(match[1]))):
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True
