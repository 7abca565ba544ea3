"""Text to token ids and back with the tokenizer that the file carries, and the text of a generation as it grows."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer:
    """The file's tokenizer. `bos`: begin-of-text token or None; `add_bos`: prompts start with it; `eos`: end tokens.

    Raises ValueError when `json` is not a tokenizer of the tokenizers package.
    """

    def __init__(self, json: str, *, bos: int | None = None, add_bos: bool = False, eos: Sequence[int] = ()) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"tokenizer.huggingface.json: not a tokenizer this version can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos = bos
        self.add_bos = add_bos
        self.eos = frozenset(eos)

    @property
    def size(self) -> int:
        """Number of tokens it knows, special ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str | bytes, *, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of `text`; bytes are read as UTF-8.

        add_bos: put the begin-of-text token first if the model wants one. special: read `<|...|>` markers in the text
        as special tokens; otherwise they are plain text, so that user input cannot forge them.
        Raises ValueError when bytes are not UTF-8.
        """
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"text: expected UTF-8, found byte {text[error.start]:#04x} at {error.start}"
                ) from error
        self._tokenizer.encode_special_tokens = not special
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if add_bos and self.add_bos and self.bos is not None else ids

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; special tokens appear only when `special`. Incomplete UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)


class TextStream:
    """Turns tokens that arrive one by one into text that never splits a character.

    A token may end inside a UTF-8 sequence, and a decoder may join a token to the one before it. So the text of a short
    window of tokens is decoded again with each new token, and only what follows the part already given out is new.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the window: tokens given out last, then tokens held back
        self._held = 0  # index of the first token held back

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._tokens.append(token)
        text = self._new_text()
        return "" if text.endswith(_REPLACEMENT) else self._release(text)

    def flush(self) -> str:
        """What is still held back, at the end of the generation."""
        return self._release(self._new_text())

    def _new_text(self) -> str:
        given = self._tokenizer.decode(self._tokens[: self._held])
        return self._tokenizer.decode(self._tokens)[len(given) :]

    def _release(self, text: str) -> str:
        if text:
            del self._tokens[: self._held]
            self._held = len(self._tokens)
        return text
