"""The most that a file may hold, so that no file is written which the runtime refuses.

`runtime/src/file_limits.h` has the same numbers for C; `tests/test_keys.py` compares the two.
"""

from __future__ import annotations

MAX_KEYS = 4096
MAX_TENSORS = 65536
MAX_KEY_NAME = 256  # bytes
MAX_TENSOR_NAME = 63  # bytes; other readers keep a name in 64 with a closing 0
MAX_DIMENSIONS = 4
MAX_STRING = 268435456  # bytes
MAX_ARRAY = 16777216  # elements

MAX_VOCAB_SIZE = 1048576
MAX_CONTEXT_LENGTH = 1048576
MAX_EMBEDDING_LENGTH = 65536
MAX_BLOCK_COUNT = 1024
MAX_FEED_FORWARD_LENGTH = 262144
MAX_HEAD_COUNT = 1024
MAX_HEAD_DIM = 1024
MAX_ROUTER_HIDDEN = 16
MAX_BUDGETS = 256
