"""Which models there are: the table of architectures, and from a config.json to a ModelSpec (no torch here)."""

from mobiquant.architectures.parse import parse_config
from mobiquant.architectures.reader import UnsupportedModelError
from mobiquant.architectures.rope import ROPE_KINDS
from mobiquant.architectures.spec import LOCAL_ROPE, MAIN_ROPE, NO_ROPE, NO_SCALING, ModelSpec, RopeScaling
from mobiquant.architectures.table import ARCHITECTURES, Architecture

__all__ = [
    "ARCHITECTURES",
    "LOCAL_ROPE",
    "MAIN_ROPE",
    "NO_ROPE",
    "NO_SCALING",
    "ROPE_KINDS",
    "Architecture",
    "ModelSpec",
    "RopeScaling",
    "UnsupportedModelError",
    "parse_config",
]
