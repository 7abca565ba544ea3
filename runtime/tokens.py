"""Text to token ids and back with the tokenizer that the file carries."""

from __future__ import annotations

import hashlib
import secrets
import threading
import weakref
from collections.abc import Sequence
from functools import cached_property

import tokenizers


class Tokenizer:
    """The file's tokenizer. `bos`: begin-of-text token or None; `add_bos`: prompts start with it; `eos`: end tokens, of
    which templates know the first as `end`.

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
        self.end = eos[0] if eos else None
        self._special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        self._secret = secrets.token_hex(16)

    @property
    def size(self) -> int:
        """Number of tokens it knows, special ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def markers(self) -> list[str]:
        """The texts that `encode` with `special` reads as special tokens."""
        return [self._tokenizer.id_to_token(token) for token in sorted(self._special)]

    def has_markers(self, text: str) -> bool:
        """Whether `encode` with `special` reads a special token in `text`, also where a normalizer makes its marker."""
        return not self._special.isdisjoint(self.encode(text, add_bos=False, special=True))

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

    def encode_between(self, texts: Sequence[str], markers: Sequence[str]) -> list[int]:
        """Token ids of `texts` with the special token of one of `markers` between each and the next; markers inside the
        texts are plain text. As `encode` with `special` of all joined, were it not for those."""
        joined = texts[0] + "".join(
            f"{self._secret}{m}{self._secret}{text}" for m, text in zip(markers, texts[1:], strict=True)
        )
        tokenizer, real = self._renamed
        return [real.get(token, token) for token in tokenizer.encode(joined, add_special_tokens=False).ids]

    @cached_property
    def _renamed(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A copy of the tokenizer that knows special tokens by names that no text can hold, and their true ids."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        names: dict[str, int] = {}
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            if added.special:
                name = f"{self._secret}{added.content}{self._secret}"
                names[name] = token
                # Not special, because those are text to the copy.
                renamed = tokenizers.AddedToken(name, lstrip=added.lstrip, rstrip=added.rstrip, normalized=False)
                copy.add_tokens([renamed])
        return copy, {copy.token_to_id(name): token for name, token in names.items()}

    def piece(self, token: int) -> str:
        """The text of one token as it stands inside a text, special ones too; alone, some decoders drop its space."""
        once, twice = (self.decode([token] * count, special=True) for count in (1, 2))
        return twice[len(once) :]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; special tokens appear only when `special`. Incomplete UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)


_open: weakref.WeakValueDictionary[tuple[object, ...], Tokenizer] = weakref.WeakValueDictionary()


def shared_tokenizer(json: str, *, bos: int | None, add_bos: bool, eos: Sequence[int]) -> Tokenizer:
    """As Tokenizer, or the one that another model has open with the same arguments: building one takes longer than
    opening a file, and the tokenizers package keeps about a kilobyte of each for good."""
    key = (hashlib.sha256(json.encode("utf-8", "surrogatepass")).digest(), bos, add_bos, tuple(eos))
    found = _open.get(key)
    if found is None:  # no lock, which a forked child might find taken; two at once are only one too many
        found = _open[key] = Tokenizer(json, bos=bos, add_bos=add_bos, eos=eos)
    return found


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
