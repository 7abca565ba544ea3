"""Training windows for a whole model: each of the calibration text's once, the rest written by the model itself.

Thousands of steps on a few megabytes of text would fit that text and not the model. What the original model writes,
sampling from its own predictions after a few tokens of the text, has no end, and is what it must keep predicting.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from mobiquant.checkpoint import read_tensors, write_tensors
from mobiquant.recipes import ModelTask

_FILE = "recipe-text.safetensors"
# Tokens of the text that a window of the model's own begins with.
_PROMPT = 32
# A token takes 50 ms for 1,100 windows of tale-46m and 62 for 5,700 (H200), so they are written together.
_LARGEST_BATCH = 8192
_REPEATS = 6
# Share of the device's memory for keys and values.
_CACHE_SHARE = 0.6


def training_windows(task: ModelTask, count: int) -> np.ndarray:
    """int64 [count, seq_len] in seeded order. One of the text comes once at most, an own one about _REPEATS times."""
    text = task.windows(count)
    real = text.training[: min(count, text.distinct)]
    missing = count - len(real)
    random = np.random.default_rng(task.settings.seed)
    if missing:
        prompts = task.windows(count + -(-missing // _REPEATS)).training[count:, :_PROMPT]
        own = _written(task, prompts)
        real = np.concatenate((real, own[np.resize(random.permutation(len(own)), missing)]))
    return real[random.permutation(count)]


def _written(task: ModelTask, prompts: np.ndarray) -> np.ndarray:
    """Every prompt continued to seq_len tokens, from the file of an earlier run as far as that came."""
    path = task.folder / _FILE
    done = [read_tensors(path)["windows"]] if path.is_file() else []
    batch = _batch_size(task)
    start = sum(map(len, done))
    if start < len(prompts):
        model = AutoModelForCausalLM.from_pretrained(task.source.path, dtype=_dtype(task.device)).to(task.device).eval()
        with tqdm(total=len(prompts), initial=start, desc="own text", unit="window") as bar:
            for first in range(start, len(prompts), batch):
                done.append(_continue(model, prompts[first : first + batch], task, first))
                _save(path, done)
                bar.update(len(done[-1]))
        del model
        if task.device.type == "cuda":
            torch.cuda.empty_cache()
    return np.concatenate(done)


@torch.no_grad()
def _continue(model: nn.Module, prompts: np.ndarray, task: ModelTask, first: int) -> np.ndarray:
    ids = torch.from_numpy(prompts).to(task.device)
    length = task.settings.seq_len
    if length <= ids.shape[1]:
        return prompts[:, :length]
    model.generation_config.eos_token_id = None  # a window may hold the end of one document and the next
    cache = Cache(layers=[_RoomyLayer(length) for _ in range(task.source.block_count)])
    with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
        torch.manual_seed(task.settings.seed * 1_000_003 + first)
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=length - ids.shape[1], pad_token_id=0,
            past_key_values=cache,
        )  # fmt: skip
    return written.cpu().numpy()


class _RoomyLayer(DynamicLayer):
    """Keys and values of one block with room for a whole window: the library's own layer copies them all per token."""

    def __init__(self, length: int):
        super().__init__()
        self._length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """[windows, kv heads, new, head_dim] of both -> views of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            self._room = key_states.new_empty(2, batch, heads, self._length, width)
        start = self.keys.shape[-2] if self.keys.dim() == 4 else 0
        end = start + key_states.shape[-2]
        self._room[0, :, :, start:end], self._room[1, :, :, start:end] = key_states, value_states
        self.keys, self.values = self._room[0, :, :, :end], self._room[1, :, :, :end]
        return self.keys, self.values


def _save(path: Path, done: list[np.ndarray]) -> None:
    write_tensors(path, {"windows": np.concatenate(done)})


def _batch_size(task: ModelTask) -> int:
    config = task.source.config
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    if task.device.type != "cuda":
        return 64
    memory = _CACHE_SHARE * torch.cuda.get_device_properties(task.device).total_memory
    return max(1, min(_LARGEST_BATCH, int(memory / (width * task.settings.seq_len * _dtype(task.device).itemsize))))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
