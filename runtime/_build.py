"""How the C library becomes the module `runtime._native` (cffi, API mode, stable ABI).

The declarations come from the two headers themselves, between the marks `cffi: begin` and `cffi: end`, so Python and C
cannot disagree. `setup.py` names `ffibuilder` below; the paths are relative to the repository root, where pip builds.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).parent
HEADERS = tuple(ROOT / name for name in ("include/mobiquant.h", "src/kernels.h", "src/measure.h", "program/fault.h"))

# No contraction: a fused multiply-add appears only where the source writes one, so every kernel gives the same bits.
COMPILE_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]


def declarations(header: Path) -> str:
    """The C text of `header` between its cffi marks. Raises ValueError when the marks are missing."""
    match = re.search(r"/\* cffi: begin \*/(.*)/\* cffi: end \*/", header.read_text(encoding="utf-8"), re.DOTALL)
    if match is None:
        raise ValueError(f"{header}: expected the marks `/* cffi: begin */` and `/* cffi: end */`, found none")
    return match.group(1)


def version() -> str:
    """The package's version, read as text: a build environment has nothing of ours installed."""
    source = (ROOT.parent / "mobiquant" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise ValueError('mobiquant/__init__.py: expected a line `__version__ = "..."`, found none')
    return match.group(1)


def build() -> FFI:
    """The builder that setuptools' `cffi_modules` asks for."""
    ffi = FFI()
    for header in HEADERS:
        ffi.cdef(declarations(header))
    folders = (ROOT / "src", ROOT / "kernels", ROOT / "program")
    warnings = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("MOBIQUANT_WERROR") == "1" else []
    ffi.set_source(
        "runtime._native",
        "".join(f'#include "{header.name}"\n' for header in HEADERS),
        sources=[str(path) for folder in folders for path in sorted(folder.glob("*.c"))],
        include_dirs=[str(ROOT / "include"), str(ROOT / "src"), str(ROOT / "program")],
        depends=[str(path) for folder in (ROOT / "include", *folders) for path in sorted(folder.glob("*.h"))],
        define_macros=[("MQ_VERSION", f'"{version()}"')],
        extra_compile_args=COMPILE_FLAGS + warnings,
        extra_link_args=["-pthread"],
        libraries=["m", "dl"],
        py_limited_api=True,
    )
    return ffi


ffibuilder = build()
