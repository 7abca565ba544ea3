"""The hyper-parameters of one model: what the plan of tensors and the file's metadata are derived from."""

from __future__ import annotations

from dataclasses import dataclass

from export import keys, limits
from export.errors import ExportError
from export.keys import ROUTER_POINTS
from mobiquant.architectures import NO_SCALING, RopeScaling
from mobiquant.packing import SLICE_COUNT


@dataclass(frozen=True)
class ModelShape:
    """Sizes and flags of a model (docs/format.md, The forward pass) and of its routers; flags that are left out are
    Llama's.

    Raises ExportError for a size the format does not allow.
    """

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
    attention_scale: float | None = None  # None: 1 / √head_dim
    attention_softcap: float = 0.0  # 0: none
    output_softcap: float = 0.0
    embedding_scale: float = 1.0
    activation: str = "silu"
    rope_dim: int = 0  # leading dimensions of a head that are rotated; 0: all
    rope_scaling: RopeScaling = NO_SCALING
    rope_pattern: tuple[int, ...] = ()  # per block 0 not rotated, 1 main, 2 local table; empty: all 1
    sliding_window: int = 0  # positions a token sees in a windowed block, its own counted; 0: no block has a window
    sliding_window_pattern: tuple[int, ...] = ()  # per block 1 windowed, 0 not; empty: all windowed
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    static_order: tuple[int, ...] = ()  # linears as block·7 + place in LINEARS; empty: no static budgets

    def __post_init__(self) -> None:
        for name, most in {
            "vocab_size": limits.MAX_VOCAB_SIZE,
            "context_length": limits.MAX_CONTEXT_LENGTH,
            "embedding_length": limits.MAX_EMBEDDING_LENGTH,
            "block_count": limits.MAX_BLOCK_COUNT,
            "feed_forward_length": limits.MAX_FEED_FORWARD_LENGTH,
            "head_count": limits.MAX_HEAD_COUNT,
            "head_count_kv": limits.MAX_HEAD_COUNT,
            "head_dim": limits.MAX_HEAD_DIM,
            "router_hidden": limits.MAX_ROUTER_HIDDEN,
        }.items():
            _check(1 <= getattr(self, name) <= most, name, f"1 to {most}", getattr(self, name))
        shared = self.head_count % self.head_count_kv == 0
        _check(shared, "head_count", f"a multiple of {self.head_count_kv} key heads", self.head_count)
        rotated = self.rope_dim or self.head_dim
        good = rotated % 2 == 0 and rotated <= self.head_dim
        _check(good, "head_dim", f"an even number of rotated dimensions, at most {self.head_dim}", rotated)

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

    def block_vectors(self) -> dict[str, int]:
        """Names in the file, inside a block, and lengths of its vectors, besides those of linears and routers."""
        width, dim = self.embedding_length, self.head_dim
        vectors = {keys.TENSOR_ATTN_NORM: width, keys.TENSOR_FFN_NORM: width}
        if self.post_norms:
            vectors |= {keys.TENSOR_ATTN_POST_NORM: width, keys.TENSOR_FFN_POST_NORM: width}
        if self.qk_norm:
            vectors |= {keys.TENSOR_Q_NORM: dim, keys.TENSOR_K_NORM: dim}
        biased = [*(("attn_q", "attn_k", "attn_v") if self.qkv_bias else ()), *(("attn_output",) * self.output_bias)]
        return vectors | {f"{name}.{keys.SUFFIX_BIAS}": self.linear(name)[0] for name in biased}

    def router_columns(self, point: str) -> int:
        """Length of the input that the router at `point` and its linears read."""
        return self.linear(ROUTER_POINTS[point][0])[1]

    def router_linears(self, point: str) -> int:
        """How many linears the router at `point` serves."""
        return len(ROUTER_POINTS[point])


def _check(good: bool, name: str, expected: str, found: object) -> None:
    if not good:
        raise ExportError(f"{name}: expected {expected}, found {found}")
