"""The hyper-parameters of one model: what the plan of tensors and the file's metadata are derived from."""

from __future__ import annotations

from dataclasses import dataclass

from export.errors import ExportError
from export.keys import ROUTER_POINTS
from mobiquant.packing import SLICE_COUNT


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model and of its routers. Raises ExportError for a size the format does not allow."""

    vocab_size: int
    context_length: int
    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    rms_epsilon: float
    rope_freq_base: float
    tied: bool  # the output head is the embedding
    router_hidden: int
    budgets: tuple[float, ...]  # average bits at which thresholds are stored, ascending from 2 to 8
    embedding_depth: int = SLICE_COUNT
    output_depth: int = SLICE_COUNT
    base_architecture: str = "llama"
    sliding_window: int = 0  # positions a token sees in a windowed block, its own counted; 0: no block has a window
    sliding_window_pattern: tuple[int, ...] = ()  # 1 for a windowed block, 0 for one that sees all; empty: all windowed
    static_order: tuple[int, ...] = ()  # linears as block·7 + place in LINEARS; empty: no static budgets

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "context_length",
            "embedding_length",
            "block_count",
            "feed_forward_length",
            "head_count",
            "head_count_kv",
            "head_dim",
        ):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        shared = self.head_count % self.head_count_kv == 0
        _check(shared, "head_count", f"a multiple of {self.head_count_kv} key heads", self.head_count)
        _check(self.head_dim % 2 == 0, "head_dim", "an even number", self.head_dim)

    def linear(self, name: str) -> tuple[int, int]:
        """(rows, columns) of a linear of a block, or of `token_embd` and `output`."""
        width, heads, kv = self.embedding_length, self.head_count * self.head_dim, self.head_count_kv * self.head_dim
        return {
            "attn_q": (heads, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_output": (width, heads),
            "ffn_gate": (self.feed_forward_length, width),
            "ffn_up": (self.feed_forward_length, width),
            "ffn_down": (width, self.feed_forward_length),
            "token_embd": (self.vocab_size, width),
            "output": (self.vocab_size, width),
        }[name]

    def router_columns(self, point: str) -> int:
        """Length of the input that the router at `point` and its linears read."""
        return self.linear(ROUTER_POINTS[point][0])[1]

    def router_linears(self, point: str) -> int:
        """How many linears the router at `point` serves."""
        return len(ROUTER_POINTS[point])


def _check(good: bool, name: str, expected: str, found: object) -> None:
    if not good:
        raise ExportError(f"{name}: expected {expected}, found {found}")
