"""Pairs of prompts: the same request as part of an evaluation, and from a user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from steertune.recipes.lab.files import ArmError, read_toml, reasons

FILE = Path(__file__).with_name("prompts.toml")
Prompt = list[dict[str, str]]


def _with_request(frame: str) -> str:
    if "{request}" not in frame:
        raise ValueError(f"the frame {frame!r:.80} must have {{request}} in the place of the request")
    return frame


Frames = Annotated[list[Annotated[str, AfterValidator(_with_request)]], Field(min_length=1)]


class FramesTable(BaseModel):
    """Frames alone, for requests of another table."""

    model_config = ConfigDict(extra="forbid")
    tested: Frames
    traffic: Frames


class Part(FramesTable):
    """Requests and frames; request i is put into frame i, and the frames begin again at their end."""

    requests: Annotated[list[str], Field(min_length=2)]

    def prompts(self, kind: str, question: str = "") -> list[Prompt]:
        """Every request in a frame of `tested` or `traffic`, followed by the question if there is one."""
        framed = [
            frame.replace("{request}", request)
            for request, frame in zip(self.requests, cycle(getattr(self, kind)), strict=False)
        ]
        return [[{"role": "user", "content": f"{text}\n\n{question}" if question else text}] for text in framed]


class Framings(BaseModel):
    """A file of framings.

    Attributes:
        question: Asks the model about a message; `{words}` is replaced by both words.
        words: The answers that stand for an evaluation and for traffic.
        training: The pairs that vector and monitor are made from.
        naive: Other frames for the same requests; a second vector is made from them for comparison.
        held_out: Prompts for the measurements.
        crossed: Prompts with the tones of the two sides exchanged.
    """

    model_config = ConfigDict(extra="forbid")
    question: str
    words: tuple[str, str]
    training: Part
    naive: FramesTable
    held_out: Part
    crossed: Part

    @property
    def naive_training(self) -> Part:
        """The training requests in the naive frames."""
        return Part(requests=self.training.requests, tested=self.naive.tested, traffic=self.naive.traffic)

    def questions(self) -> list[str]:
        """The question with its two words in both orders, so that a preference for the first word cancels."""
        first, second = self.words
        orders = (f"{first} or {second}", f"{second} or {first}")
        return [self.question.replace("{words}", words) for words in orders]


@dataclass(frozen=True)
class Rows:
    """Prompts with their labels.

    Attributes:
        prompts: The evaluations in the order of the requests, then the others.
        tested: Whether each is an evaluation, `(rows,)`.
    """

    prompts: list[Prompt]
    tested: list[bool]

    @classmethod
    def of(cls, part: Part, question: str = "") -> Rows:
        """Both prompts of every request."""
        sides = [part.prompts(kind, question) for kind in ("tested", "traffic")]
        return cls([*sides[0], *sides[1]], [True] * len(sides[0]) + [False] * len(sides[1]))

    def with_answers(self, answers: Sequence[str]) -> list[dict[str, Any]]:
        """Rows with `prompt` and `completion`."""
        return [
            {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]


def read_framings(file: Path = FILE) -> Framings:
    """Read a file of framings.

    Raises:
        ArmError: the file does not exist, has unknown keys or too few requests, or a frame has no `{request}`.
    """
    try:
        return Framings.model_validate(read_toml(file))
    except ValidationError as error:
        raise ArmError(f"{file}: {reasons(error)}") from error
