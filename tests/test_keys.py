"""The names and constants of the file are the same in Python (export.keys, mobiquant.packing) and in C (keys.h)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from export import keys
from mobiquant import checkpoint, packing

HEADER = Path(__file__).parent.parent / "runtime" / "src" / "keys.h"
DEFINES = dict(re.findall(r"^#define MQ_(\w+) (.+)$", HEADER.read_text(encoding="utf-8"), re.MULTILINE))


def c_strings(name: str) -> list[str]:
    return re.findall(r'"([^"]*)"', DEFINES[name])


def python_value(name: str) -> object:
    return getattr(keys, name) if hasattr(keys, name) else getattr(packing, name)


# Lists, and their lengths, which Python does not name.
LISTS = {"LINEARS", "LINEAR_NAMES", "ROUTERS", "ROUTER_NAMES", "ROUTER_LINEARS"}


@pytest.mark.parametrize("name", sorted(set(DEFINES) - LISTS))
def test_c_constant_equals_its_python_namesake(name: str) -> None:
    value = DEFINES[name]
    assert python_value(name) == (value.strip('"') if value.startswith('"') else int(value))


def test_the_reference_computes_with_the_constants_of_the_c_definition() -> None:
    pytest.importorskip("torch")
    from mobiquant import arithmetic

    text = (HEADER.parent / "definition.h").read_text(encoding="utf-8")
    found = {
        name: float(value) for name, value in re.findall(r"^#define MQ_(\w+) \(?([-\d.e]+)f?\)?$", text, re.MULTILINE)
    }
    coefficients = {f"EXP_C{7 - i}": value for i, value in enumerate(arithmetic.EXP_COEFFICIENTS)}
    for name in found:
        assert found[name] == (coefficients[name] if name in coefficients else getattr(arithmetic, name))
    assert len(found) == 15


def test_linears_and_routers_come_in_the_same_order() -> None:
    assert tuple(c_strings("LINEAR_NAMES")) == keys.LINEARS
    assert int(DEFINES["LINEARS"]) == len(keys.LINEARS)
    assert c_strings("ROUTER_NAMES") == list(keys.ROUTER_POINTS)
    assert int(DEFINES["ROUTERS"]) == len(keys.ROUTER_POINTS)
    sizes = [len(names) for names in keys.ROUTER_POINTS.values()]
    assert [int(size) for size in re.findall(r"\d+", DEFINES["ROUTER_LINEARS"])] == sizes


def test_checkpoint_has_the_same_router_points_and_numbers_of_linears() -> None:
    ours = {point: len(names) for point, names in keys.ROUTER_POINTS.items()}
    assert {point: len(names) for point, names in checkpoint.ROUTER_POINTS.items()} == ours


def test_every_key_that_the_loader_needs_is_in_the_header() -> None:
    # The runtime leaves these to Python or to other readers of the file.
    not_for_c = {"KEY_NAME", "KEY_ROPE_FREQ_BASE", "KEY_ROPE_DIMENSION", "KEY_TOKENIZER", "KEY_CHAT_TEMPLATE"}
    not_for_c |= {"KEY_BOS_TOKEN", "KEY_ADD_BOS", "KEY_EOS_TOKENS"}
    assert {name for name in vars(keys) if name.startswith("KEY_")} - not_for_c == {
        name for name in DEFINES if name.startswith("KEY_")
    }
