"""Build of the compiled module only; everything else about the package is in pyproject.toml."""

from __future__ import annotations

from setuptools import setup

setup(
    cffi_modules=["runtime/_build.py:ffibuilder"],
    # One wheel serves CPython 3.10 and every later version.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
