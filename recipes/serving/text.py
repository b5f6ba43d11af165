"""The text of an answer, token by token: whole characters only, and nothing that could still become a stop text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from steertune.recipes.serving.jobs import Piece, Scored

_CONTEXT = 8  # prompt tokens that are also decoded, since they decide whether the answer begins with a space
_BROKEN = "�"
"""The output of tokenizers for the bytes of an incomplete character."""


class Text:
    """Decodes one answer.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Tokens before the answer.
        stops: Texts that end the answer.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt[-_CONTEXT:])
        self._start, self._decoded = 0, len(self._ids)
        self._held = ""
        self._released = 0
        self._scores: deque[tuple[int, Scored]] = deque()

    def push(self, token: int, score: Scored | None = None) -> Piece:
        """Add a token; return the text that can be shown now."""
        if score is not None:
            self._scores.append((self._released + len(self._held), score))
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._decoded])
        now = self._decode(self._ids[self._start :])
        if not now.endswith(_BROKEN):
            self._held += now[len(before) :]
            if now != before:  # a token without text, such as a special one, does not decide whether a space follows
                self._start = self._decoded
            self._decoded = len(self._ids)
        return self._release()

    def flush(self) -> Piece:
        """The remaining text, after the last token."""
        if self.stopped:
            return Piece("")
        before = self._decode(self._ids[self._start : self._decoded])
        self._held += self._decode(self._ids[self._start :])[len(before) :]
        piece = self._release()
        if self.stopped:
            return piece
        rest, self._held = self._held, ""
        self._released += len(rest)
        scores = tuple(score for _, score in self._scores)
        self._scores.clear()
        return Piece(piece.text + rest, piece.scores + scores)

    def _release(self) -> Piece:
        """The text that cannot become part of a stop text, and the scores of the tokens that begin in it."""
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)], ""
        else:
            overlap = max((_overlap(self._held, stop) for stop in self._stops), default=0)
            cut = len(self._held) - overlap
            text, self._held = self._held[:cut], self._held[cut:]
        self._released += len(text)
        scores = []
        while self._scores and self._scores[0][0] < self._released:
            scores.append(self._scores.popleft()[1])
        return Piece(text, tuple(scores))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is the beginning of a stop text."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
