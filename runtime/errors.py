"""The error of the C library as an exception; importable without the compiled module."""

from __future__ import annotations


class MobiQuantError(RuntimeError):
    """The library refused or failed. `status` is its error name, for example "MQ_ERR_TRUNCATED"."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status
