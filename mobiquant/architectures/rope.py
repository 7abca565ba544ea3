"""The rotation that a config.json asks for: base, rotated dimensions and scaling, as transformers reads them."""

from __future__ import annotations

import math

import numpy as np

from mobiquant.architectures.reader import FULL, SLIDING, ConfigReader
from mobiquant.architectures.spec import NO_SCALING, RopeScaling

# Rotary types of the main table, by transformers' names. A local table may have those alone whose frequencies are all
# that there is to them.
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_LOCAL_ROPE_KINDS = ("default", "linear", "llama3")
_ORIGINAL = "original_max_position_embeddings"


def read_rope(
    reader: ConfigReader, main_kinds: tuple[str, ...], partial: bool, head_dim: int, positions: int
) -> tuple[float, int, RopeScaling]:
    """(base, rotated dimensions, scaling) of the main table. Refuses kinds of scaling that the format does not know.

    Old configurations have rope_theta and rope_scaling, newer ones both in rope_parameters, Gemma 3's by kind of layer.
    """
    given = reader.get("rope_parameters")
    by_layer = isinstance(given, dict) and (FULL in given or SLIDING in given)
    main, local = (given.get(FULL), given.get(SLIDING)) if by_layer else (given, None)
    base, factor = reader.number("rope_theta"), reader.get("partial_rotary_factor")
    scaling = NO_SCALING
    for table, kinds in (
        (main, main_kinds),
        (local, _LOCAL_ROPE_KINDS),
        (reader.get("rope_scaling"), main_kinds),
    ):
        if table is None:
            continue
        if not isinstance(table, dict):
            raise reader.error("rope_parameters", "an object", table)
        kind = table.get("rope_type", table.get("type", "default"))
        if kind not in kinds:
            raise reader.error("rope_type", f"one of {', '.join(kinds)}", kind)
        if table is main:
            base = reader.of(table).number("rope_theta", default=base)
        if table is not local and kind != "default":
            scaling = _scaling(reader, reader.of(table), kind, positions)
        factor = table.get("partial_rotary_factor", factor)
    factor = 1.0 if factor is None else factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise reader.error("partial_rotary_factor", "a number above 0, at most 1", factor)
    if factor != 1 and not partial:
        raise reader.error("partial_rotary_factor", "1.0 (the whole head is rotated)", factor)
    rotary_dim = int(head_dim * factor)
    least = 4 if scaling.kind == "dynamic" else 2
    if rotary_dim % 2 or rotary_dim < least:
        raise reader.error("head_dim", f"an even number of rotated dimensions, at least {least}", rotary_dim)
    return base, rotary_dim, scaling


def _scaling(reader: ConfigReader, table: ConfigReader, kind: str, positions: int) -> RopeScaling:
    """What the frequencies do not tell, as transformers takes it from a table of rope parameters."""
    if kind in ("linear", "llama3"):
        return RopeScaling(kind)
    if kind == "dynamic":  # transformers stretches from max_position_embeddings on, whatever else the table says
        factor = table.number("factor")
        if factor < 1:
            raise table.error("factor", "at least 1", factor)
        return RopeScaling(kind, float(np.float32(factor)), positions)
    original = reader.integer(_ORIGINAL) if reader.get(_ORIGINAL) else table.integer(_ORIGINAL, default=positions)
    factor = table.number("factor", default=positions / original)
    attention = table.number("attention_factor", default=_yarn_attention(table, factor))
    if attention <= 0:
        raise table.error("attention_factor", "a number above 0", attention)
    return RopeScaling(kind, factor, original, float(np.float32(attention)))


def _yarn_attention(table: ConfigReader, factor: float) -> float:
    """YaRN's temperature as a factor of cosines and sines, from the two scales of its logarithm when both are there."""

    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scale, scale_all = (table.number(key, default=0.0) for key in ("mscale", "mscale_all_dim"))
    return growth(scale) / growth(scale_all) if scale and scale_all else growth(1.0)
