"""The vocabulary of a checkpoint folder: tokenizer.json whole, the special token ids and the chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from export.errors import ExportError


@dataclass(frozen=True)
class Vocabulary:
    """What the file says about text. `eos_tokens`: generation stops at any of them, the first is the one that chat
    templates name; may be empty."""

    tokenizer_json: str
    bos_token: int | None = None
    add_bos: bool = False
    eos_tokens: tuple[int, ...] = ()
    chat_template: str | None = None


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the tokenizer files of a Hugging Face folder.

    The begin-of-text token is the one tokenizer_config.json names, else config.json's; it is added to prompts when
    `add_bos_token` says so, or, without that key, when tokenizer.json adds it. End tokens are generation_config.json's,
    else config.json's, the one of tokenizer_config.json first.
    Raises ExportError for a missing or unreadable file and for a token id outside 0..vocab_size-1.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer_json = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except FileNotFoundError as error:
        found = "no file"
        if (folder / "tokenizer.model").is_file():
            found = (
                "tokenizer.model alone; make it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        raise ExportError(f"{path}: expected the tokenizer, found {found}") from error
    except Exception as error:  # the tokenizers package raises bare Exception for bad JSON
        raise ExportError(f"{path}: expected a tokenizer of the tokenizers package: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ExportError(f"{path}: expected token ids below the model's vocab_size {vocab_size}, found {largest}")

    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    bos_token = _bos_token(tokenizer_config, config, tokenizer, folder)
    eos_tokens = _as_list(generation.get("eos_token_id", config.get("eos_token_id")))
    named = tokenizer.token_to_id(_content(tokenizer_config.get("eos_token")) or "")
    eos_tokens.sort(key=lambda token: token != named)
    for token in (*eos_tokens, *_as_list(bos_token)):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ExportError(f"{folder}: bos or eos token id: expected 0..{vocab_size - 1}, found {token!r}")
    adds_bos = tokenizer.encode("").ids[:1] == [bos_token]
    return Vocabulary(
        tokenizer_json=tokenizer_json,
        bos_token=bos_token,
        add_bos=bos_token is not None and bool(tokenizer_config.get("add_bos_token", adds_bos)),
        eos_tokens=tuple(eos_tokens),
        chat_template=_chat_template(folder, tokenizer_config),
    )


def _bos_token(
    tokenizer_config: dict[str, Any], config: dict[str, Any], tokenizer: Tokenizer, folder: Path
) -> int | None:
    if "bos_token" not in tokenizer_config:
        return config.get("bos_token_id")
    text = _content(tokenizer_config["bos_token"])
    if text is None:
        return None
    token_id = tokenizer.token_to_id(text)
    if token_id is None:
        path = folder / "tokenizer_config.json"
        raise ExportError(f"{path}: bos_token: expected a token of tokenizer.json, found {text!r}")
    return token_id


def _content(token: object) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named templates; "default" is the one for plain chat
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _as_list(value: object) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty when there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
