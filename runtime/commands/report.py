"""What `mobiquant info` prints: a file's shape, where its bytes are, and which kernels this machine runs."""

from __future__ import annotations

import os
import platform

from runtime.cpu import cpu_flags
from runtime.model import Model
from runtime.native import ModelInfo, device_info, kernels, version

_SLICES = 4


def describe(model: Model) -> str:
    """Lines of `label  text` about an opened model."""
    info = model.info
    rows = [
        ("file", _file(model)),
        ("name", model.name),
        ("shape", _shape(info)),
        ("parameters", f"{_parameters(info):,}, of which {info.routed_weights:,} in routed linears"),
        *((f"slice {index + 1}", _size(size)) for index, size in enumerate(info.slice_bytes)),
        ("scales", _size(info.scale_bytes)),
        (
            "routers",
            f"{_size(info.router_bytes)}, {info.router_bytes / _bytes_at(info, 1):.2%} of what 2 bits read",
        ),
        ("embedding", f"{_size(info.embedding_bytes)}, read at {2 * info.embedding_depth} bits"),
        ("output head", _output(info)),
        ("bits per weight", _bits_per_weight(info)),
        ("tokenizer", _tokenizer(model)),
        *_machine(model.kernel),
    ]
    return _table(rows)


def describe_machine() -> str:
    """Lines of `label  text` about this installation: version, the kernels it would use, and why.

    Raises ValueError when MOBIQUANT_KERNEL asks for kernels that this machine cannot run.
    """
    usable = [kernel.name for kernel in kernels() if kernel.supported]
    active = os.environ.get("MOBIQUANT_KERNEL") or usable[0]
    if active not in usable:
        raise ValueError(f"MOBIQUANT_KERNEL: expected one of {', '.join(usable)}, found {active!r}")
    return _table([("version", version()), ("python", platform.python_version()), *_machine(active)])


def _machine(active: str) -> list[tuple[str, str]]:
    usable, gpu = device_info()
    rows = [("kernels", _kernels(active)), ("cpu", " ".join(cpu_flags()) or "flags unknown")]
    return [*rows, ("gpu", gpu if usable else f"none in use: {gpu}")]


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _file(model: Model) -> str:
    info = model.info
    if info.file_bytes >= info.expected_bytes:
        return f"{model.path}, {_size(info.file_bytes)}"
    present, missing = _size(info.file_bytes), _size(info.expected_bytes - info.file_bytes)
    return f"{model.path}, {present}, cut short by {missing}: {info.max_depth} of {_SLICES} slices usable"


def _shape(info: ModelInfo) -> str:
    return (
        f"{info.block_count} blocks, width {info.embedding_length}, feed-forward {info.feed_forward_length}, "
        f"{info.head_count} heads of {info.head_dim}, {info.head_count_kv} key heads, "
        f"{info.vocab_size} tokens, context {info.context_length}"
    )


def _parameters(info: ModelInfo) -> int:
    matrices = 2 if info.output_bytes else 1
    norms = (2 * info.block_count + 1) * info.embedding_length
    return info.routed_weights + matrices * info.vocab_size * info.embedding_length + norms


def _output(info: ModelInfo) -> str:
    size = _size(info.output_bytes) if info.output_bytes else "tied to the embedding"
    return f"{size}, read at {2 * info.output_depth} bits"


def _bytes_at(info: ModelInfo, depth: int) -> int:
    """Bytes of the routed linears that a token at `depth` reads, scales and routers included."""
    return sum(info.slice_bytes[:depth]) + info.scale_bytes + info.router_bytes


def _bits_per_weight(info: ModelInfo) -> str:
    depths = range(1, info.max_depth + 1)
    figures = (f"{8 * _bytes_at(info, depth) / info.routed_weights:.2f} at {2 * depth} bits" for depth in depths)
    return ", ".join(figures) + " (scales and routers counted)"


def _tokenizer(model: Model) -> str:
    tokenizer = model.tokenizer
    begin = "none" if tokenizer.bos is None else f"{tokenizer.bos}{' (added to prompts)' if tokenizer.add_bos else ''}"
    end = ", ".join(map(str, sorted(tokenizer.eos))) or "none"
    chat = "with" if model.chat_template else "no"
    return f"{tokenizer.size} tokens, begin {begin}, end {end}, {chat} chat template"


def _kernels(active: str) -> str:
    asked = os.environ.get("MOBIQUANT_KERNEL")
    reason = "asked for by MOBIQUANT_KERNEL" if asked else "the best this CPU supports"
    names = []
    for kernel in kernels():
        note = f" (active, {reason})" if kernel.name == active else "" if kernel.supported else " (not on this CPU)"
        names.append(kernel.name + note)
    return ", ".join(names)


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
