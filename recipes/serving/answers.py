"""Answers in the form of OpenAI's protocol, whole and as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steertune.adapters.monitors import Monitor
from steertune.recipes.serving.gating import score_of
from steertune.recipes.serving.jobs import Done, Event, Failed, Gated, Piece, Prompt, Scored, Watched

_RULED_OUT = -9999.0
"""The value that OpenAI's service sends for a log-probability of minus infinity, which JSON cannot represent."""


@dataclass
class Choice:
    """The part of one answer that has been generated so far."""

    text: str = ""
    scores: list[Scored] = field(default_factory=list)
    reason: str | None = None
    tokens: int = 0
    failure: Failed | None = None
    watched: dict[str, list[float]] = field(default_factory=dict)
    gate: Mapping[str, Any] | None = None

    def hear(self, event: Event) -> None:
        """Add an event of the engine."""
        if isinstance(event, Prompt):
            self.scores += event.scores
        elif isinstance(event, Piece):
            self.text += event.text
            self.scores += event.scores
        elif isinstance(event, Watched):
            for name, scores in event.scores.items():
                self.watched.setdefault(name, []).extend(scores)
        elif isinstance(event, Gated):
            self.gate = event.details
        elif isinstance(event, Done):
            self.reason, self.tokens = event.reason, event.tokens
        else:
            self.failure = event


class Form:
    """The base class of responses to chats and to completions.

    Args:
        tokenizer: Decodes the tokens of the log-probabilities.
        model: The name that the request gave.
        fingerprint: Identifies the base model and the vectors that answered.
        scores: Whether log-probabilities were requested.
        monitors: The monitors that read the answers, by name.
    """

    prefix = ""
    whole = ""
    chunk = ""

    def __init__(
        self, tokenizer: Any, model: str, fingerprint: str, scores: bool, monitors: Mapping[str, Monitor]
    ) -> None:
        self.tokenizer, self.scores, self.monitors = tokenizer, scores, monitors
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._skipped = len(tokenizer.decode(self._before))
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def answer(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""
        listed = [self.complete(number, one) | self.readings(one, True) for number, one in enumerate(choices)]
        return {**self._head, "object": self.whole, "choices": listed, "usage": usage}

    def part(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """A chunk of a stream."""
        return {**self._head, "object": self.chunk, "choices": choices} | ({} if usage is None else {"usage": usage})

    def readings(self, choice: Choice, with_tokens: bool) -> dict[str, Any]:
        """The results of monitors on an answer, and the action of a gate; empty if neither was requested."""
        gate: dict[str, Any] = {} if choice.gate is None else {"gate": dict(choice.gate)}
        if not self.monitors:
            return gate
        summaries = {}
        for name, monitor in self.monitors.items():
            scores = choice.watched.get(name, [])
            score = score_of(monitor, scores)
            chance = None if score is None or monitor.calibration is None else monitor.calibration(score)
            summary = {"score": score, "flagged": score is not None and monitor.flags(score), "probability": chance}
            summaries[name] = summary | ({"tokens": scores} if with_tokens else {})
        return {"monitors": summaries, **gate}

    def complete(self, number: int, choice: Choice) -> dict[str, Any]:
        """A choice of the whole answer."""
        raise NotImplementedError

    def opening(self, number: int) -> list[dict[str, Any]]:
        """Choices of the chunk sent before any text; if empty, no chunk is sent."""
        raise NotImplementedError

    def delta(self, number: int, text: str, scores: Sequence[Scored], reason: str | None = None) -> dict[str, Any]:
        """A choice of a chunk."""
        raise NotImplementedError

    def token(self, token: int, first: bool = False) -> str:
        """A token as text, with the leading space that some tokenizers write only after another token.

        Args:
            token: Its id.
            first: Whether it begins a text.
        """
        return (
            self.tokenizer.decode([token]) if first else self.tokenizer.decode([*self._before, token])[self._skipped :]
        )


class ChatForm(Form):
    """`chat.completion`."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def complete(self, number: int, choice: Choice) -> dict[str, Any]:
        """A choice with the message."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.scores)
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def opening(self, number: int) -> list[dict[str, Any]]:
        """A choice with the role."""
        return [{"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def delta(self, number: int, text: str, scores: Sequence[Scored], reason: str | None = None) -> dict[str, Any]:
        """A choice with the new text."""
        content = {"content": text} if text or reason is None else {}
        logprobs = self._logprobs(scores) if scores else None
        return {"index": number, "delta": content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scores: Sequence[Scored]) -> dict[str, Any] | None:
        if not self.scores:
            return None
        content = [
            {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*pair) for pair in one.top]}
            for one in scores
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "�" in text else list(text.encode())}


class CompletionForm(Form):
    """`text_completion`.

    Args:
        prompts: Text of each choice's prompt if it is echoed, else None.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, prompts: Sequence[str] | None = None) -> None:
        super().__init__(*args)
        self.prompts = prompts
        self._offsets: dict[int, int] = {}

    def complete(self, number: int, choice: Choice) -> dict[str, Any]:
        """A choice with the text, after its prompt if that is echoed."""
        text = ("" if self.prompts is None else self.prompts[number]) + choice.text
        logprobs = self._logprobs(number, choice.scores)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": choice.reason}

    def opening(self, number: int) -> list[dict[str, Any]]:
        """A choice with the prompt, if that is echoed."""
        if self.prompts is None:
            return []
        return [{"index": number, "text": self.prompts[number], "logprobs": None, "finish_reason": None}]

    def delta(self, number: int, text: str, scores: Sequence[Scored], reason: str | None = None) -> dict[str, Any]:
        """A choice with the new text."""
        logprobs = self._logprobs(number, scores) if scores else None
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, number: int, scores: Sequence[Scored]) -> dict[str, Any] | None:
        if not self.scores:
            return None
        begins = self.prompts is not None and number not in self._offsets
        tokens = [self.token(one.token, begins and i == 0) for i, one in enumerate(scores)]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(number, 0))
            self._offsets[number] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one.logprob) for one in scores],
            "top_logprobs": [self._top(one) for one in scores],
            "text_offset": offsets,
        }

    def _top(self, one: Scored) -> dict[str, float] | None:
        """Log-probabilities by text. Of several tokens with the same text, the most probable one counts."""
        if one.logprob is None:
            return None
        top: dict[str, Any] = {}
        for token, logprob in one.top:
            top.setdefault(self.token(token), _finite(logprob))
        top.setdefault(self.token(one.token), _finite(one.logprob))
        return top


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _RULED_OUT)


def usage(prompts: Sequence[Sequence[int]], choices: Sequence[Choice]) -> dict[str, int]:
    """Numbers of prompt tokens, counting each prompt once, and of generated tokens."""
    read, generated = sum(map(len, prompts)), sum(choice.tokens for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}
