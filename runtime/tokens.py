"""Text to token ids and back with the tokenizer that the file carries."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import tokenizers


class Tokenizer:
    """The file's tokenizer. `bos`: begin-of-text token or None; `add_bos`: prompts start with it; `eos`: end tokens.

    Raises ValueError when `json` is not a tokenizer of the tokenizers package.
    """

    def __init__(self, json: str, *, bos: int | None = None, add_bos: bool = False, eos: Sequence[int] = ()) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"tokenizer.huggingface.json: not a tokenizer this version can read: {error}") from error
        self._lock = threading.Lock()  # `encode` sets an option of the shared tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos = bos
        self.add_bos = add_bos
        self.eos = frozenset(eos)

    @property
    def size(self) -> int:
        """Number of tokens it knows, special ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def markers(self) -> list[str]:
        """The texts that `encode` with `special` reads as special tokens."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    def marker(self, token: int | None) -> str:
        """The text of one special token, empty for None."""
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    def encode(self, text: str | bytes, *, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of `text`; bytes are read as UTF-8.

        add_bos: put the begin-of-text token first if the model wants one. special: read `<|...|>` markers in the text
        as special tokens; otherwise they are plain text, so that user input cannot forge them.
        Raises ValueError when bytes are not UTF-8.
        """
        text = as_text(text)
        with self._lock:
            self._tokenizer.encode_special_tokens = not special
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if add_bos and self.add_bos and self.bos is not None else ids

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; special tokens appear only when `special`. Incomplete UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)


def as_text(text: str | bytes) -> str:
    """Bytes are read as UTF-8. Raises ValueError with the first byte that is not, or half a surrogate pair."""
    if isinstance(text, str):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"half a surrogate pair, {text[error.start]!r}, at {error.start}"
            raise ValueError(f"text: expected Unicode text, found {found}") from None
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected UTF-8, found byte {text[error.start]:#04x} at {error.start}") from error
