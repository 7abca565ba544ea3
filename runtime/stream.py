"""Text as it grows: from tokens that arrive one by one, never splitting a character, and ending at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.tokens import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes that are no character, or not yet one, decode to
_INCOMPLETE = 3  # bytes that may still become a character
_WINDOW = 16  # tokens that are decoded again: more than a character has, and than a decoder joins


class TextStream:
    """Turns tokens that arrive one by one into text that never splits a character.

    A token may end inside a UTF-8 sequence, and a decoder may join a token to the one before it. So the text of a short
    window of tokens is decoded again with each new token, and only what follows the part already given out is new.
    before: tokens whose text is there already and goes on: a space between them and the first token counts.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before[-_WINDOW:])
        self._given = tokenizer.decode(self._tokens)  # the window's text as it was given out
        self._whole = len(self._tokens)  # tokens of the window of which all is given out
        if self._given.endswith(_REPLACEMENT):  # half a character: what completes it cannot be told apart
            self._tokens, self._given, self._whole = [], "", 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._tokens.append(token)
        text = self._text()
        new = text[len(self._given) :]
        # A longer row of replacements is none that will be completed.
        held = min(len(new) - len(new.rstrip(_REPLACEMENT)), _INCOMPLETE)
        given = text[: len(text) - held]
        new, self._given = given[len(self._given) :], given
        if (new and not held) or len(self._tokens) > 4 * _WINDOW:
            self._shorten(held)
        return new

    def flush(self) -> str:
        """What is still held back, at the end of the generation."""
        text = self._text()
        new, self._given = text[len(self._given) :], text
        return new

    def _text(self) -> str:
        text = self._tokenizer.decode(self._tokens)
        if text.startswith(self._given):
            return text
        # Some decoders take a row of bytes as one, so that one wrong byte spoils characters before it.
        return self._given + self._tokenizer.decode(self._tokens[self._whole :])

    def _shorten(self, held: int) -> None:
        """Keep the tokens since the last time, or the last of a long row; `held` characters of theirs are to come."""
        kept = self._tokens[self._whole :][-_WINDOW:]
        text = self._tokenizer.decode(kept)
        self._tokens, self._given = kept, text[: len(text) - held]
        self._whole = 0 if held else len(kept)


class StopStrings:
    """Cuts text that arrives in pieces at the first stop string, which may be spread over several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain to come before any stop string, and whether one was found."""
        text = self._held + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        # Hold back the longest end that could be the start of a stop string.
        longest = len(text) + 1
        ends = [n for stop in self._stops for n in range(1, min(len(stop), longest)) if text.endswith(stop[:n])]
        certain = len(text) - max(ends, default=0)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held
