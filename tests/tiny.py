"""The smallest synthetic model that has every part: grouped heads, several routers, room for a few sentences."""

from __future__ import annotations

from export.shape import ModelShape
from mobiquant.config import default_budgets

TINY = ModelShape(
    vocab_size=272,
    context_length=96,
    embedding_length=128,
    block_count=2,
    feed_forward_length=256,
    head_count=4,
    head_count_kv=2,
    head_dim=32,
    rms_epsilon=1e-5,
    rope_freq_base=10000.0,
    tied=True,
    router_hidden=4,
    budgets=default_budgets(),
)
