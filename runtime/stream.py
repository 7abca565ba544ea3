"""Text as it grows: from tokens that arrive one by one, never splitting a character, and ending at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.tokens import Tokenizer

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


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
