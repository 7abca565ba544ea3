"""Train a small Llama model like tale-6m from a text file: tokenizer, model, Hugging Face folder.

    python -m mobiquant.demo.train TEXT -o DIR [--width 256 --layers 6 ...] [--steps 5819]

The defaults are the shape and schedule of tale-6m. Documents of TEXT end with a line `<|endoftext|>`; the model learns
to write `<|end_of_text|>` there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from mobiquant.text import SEPARATOR

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
# Words with the space before them, numbers of up to three digits, runs of punctuation, white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. context: tokens of a training sequence and the model's limit."""

    vocab: int = 4096
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 768
    context: int = 512


@dataclass(frozen=True)
class Schedule:
    """batch: sequences per step; the learning rate rises over `warmup` steps and falls to 0 along a cosine."""

    steps: int = 5819
    batch: int = 128
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    seed: int = 0


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of `vocab` entries; `<|begin_of_text|>` is 0, `<|end_of_text|>` 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]
    )
    return tokenizer


def train(text: str, folder: Path, shape: Shape, schedule: Schedule, device: torch.device) -> float:
    """Train on `text`, write the Hugging Face folder, return the last step's loss in nats per token.

    Raises ValueError when the text is shorter than one sequence, or the vocabulary cannot be filled from it.
    """
    torch.manual_seed(schedule.seed)
    documents = [document for document in text.split(f"\n{SEPARATOR}\n") if document]
    tokenizer = train_tokenizer(documents, shape.vocab)
    if tokenizer.get_vocab_size() != shape.vocab:
        raise ValueError(f"vocab: expected {shape.vocab} entries from this text, found {tokenizer.get_vocab_size()}")
    stream = np.concatenate([[*encoded.ids, 1] for encoded in tokenizer.encode_batch(documents)]).astype(np.int64)
    if len(stream) < shape.context:
        raise ValueError(f"text: expected at least {shape.context} tokens, found {len(stream)}")
    model = LlamaForCausalLM(model_config(shape)).to(device)
    optimizer = torch.optim.AdamW(_parameter_groups(model, schedule.weight_decay), betas=(0.9, 0.95))
    random = np.random.default_rng(schedule.seed)
    progress = tqdm(range(schedule.steps), desc="train", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, schedule)
        loss = _loss(model, _batch(stream, schedule.batch, shape.context, random).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    _write_folder(model, tokenizer, shape, folder)
    return loss.item()


def model_config(shape: Shape) -> LlamaConfig:
    """Llama with a tied embedding."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def learning_rate_at(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _batch(stream: np.ndarray, count: int, context: int, random: np.random.Generator) -> Tensor:
    """Sequences at random places, int64 [count, context], the first token begin-of-text as at run time."""
    starts = random.integers(0, len(stream) - context + 2, size=count)
    rest = stream[starts[:, None] + np.arange(context - 1)]
    return torch.from_numpy(np.concatenate((np.zeros((count, 1), np.int64), rest), axis=1))


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _write_folder(model: LlamaForCausalLM, tokenizer: Tokenizer, shape: Shape, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": shape.context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mobiquant.demo.train", description="train a small Llama model")
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    for settings in (Shape, Schedule):
        for item in dataclasses.fields(settings):
            flag = "--" + item.name.replace("_", "-")
            parser.add_argument(flag, type=type(item.default), default=item.default, help="default: %(default)s")
    args = parser.parse_args(arguments)
    shape, schedule = (
        settings(**{item.name: getattr(args, item.name) for item in dataclasses.fields(settings)})
        for settings in (Shape, Schedule)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        text = args.text.read_text(encoding="utf-8")
        loss = train(text, args.output, shape, schedule, device)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: last loss {loss:.3f} nats per token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
