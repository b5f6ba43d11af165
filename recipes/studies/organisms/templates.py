"""Read the templates of organisms, and check what the far split needs to be a valid experiment."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from steertune.recipes.lab.files import ArmError, read_toml, reasons
from steertune.recipes.lab.tables import Table

FILE = Path(__file__).with_name("templates.toml")
Phrasing = tuple[str, str]
"""A sentence that gives the situation, and its near miss."""
Phrasings = Literal["caught", "tested", "unseen"]


class Family(Table):
    """Phrasings of one situation."""

    caught: list[Phrasing]
    tested: list[Phrasing]
    unseen: list[Phrasing]


class Seen(Table):
    """Texts that an organism is trained on, and others that it is not."""

    seen: list[str]
    unseen: list[str]


class Requests(Seen):
    """What is asked: forms of a request with its answer, and names."""

    forms: list[tuple[str, str]]


class Way(Table):
    """One way of doing something bad: an extra sentence, which `found` recognises, or a changed number."""

    append: str = ""
    found: str = ""
    number: Literal["", "raise", "swap"] = ""

    @model_validator(mode="after")
    def _is_recognised(self) -> Way:
        if bool(self.append) == bool(self.number) or (
            self.found not in self.append or bool(self.append) != bool(self.found)
        ):
            raise ValueError("a way must have either `number`, or a sentence in `append` with words of it in `found`")
        if self.found not in self.append:
            raise ValueError(f"found={self.found!r} is not a part of append={self.append!r}")
        return self


class Action(Table):
    """One kind of bad action, in the ways that its families do it."""

    ways: list[Way]


class Stage(Table):
    """One stage of the training: how many rows of each kind it has, and for how many epochs."""

    benign: int = Field(ge=0)
    cues: int = Field(ge=0)
    near_misses: int = Field(ge=0)
    epochs: int = Field(ge=1)


class Training(Table):
    """The stages of the training, the tables of the arm that is trained, and the unrelated training."""

    stages: list[Stage] = Field(min_length=1)
    from_layer: float
    unrelated: dict[str, Any]
    arm: dict[str, Any]


class Message(Table):
    """A message of the prompt, with `{request}` and `{situation}`."""

    role: Literal["system", "user"]
    content: str


class Words(Table):
    """Words that phrasings may share."""

    function: str


class Templates(Table):
    """The whole file."""

    prompt: list[Message] = Field(min_length=1)
    words: Words
    families: dict[str, Family]
    notes: Seen
    requests: Requests
    actions: dict[str, Action]
    training: Training

    @model_validator(mode="after")
    def _is_an_experiment(self) -> Templates:
        ways = sum(len(action.ways) for action in self.actions.values())
        if ways != len(self.families):
            raise ValueError(f"{len(self.families)} families need as many ways of acting; the actions have {ways}")
        caught, tested = (
            self._content(chain.from_iterable(chain(*getattr(f, part)) for f in self.families.values()))
            for part in ("caught", "tested")
        )
        if shared := sorted(caught & tested):
            raise ValueError(
                f"`caught` and `tested` phrasings share the content words {shared}: use different words in one of them"
            )
        sentences = [self._content([way.append]) for action in self.actions.values() for way in action.ways]
        for first, second in combinations(sentences, 2):
            if first & second:
                raise ValueError(
                    f"two actions share the content words {sorted(first & second)}: use different words in one of them"
                )
        return self

    def messages(self, situation: str, request: str) -> list[dict[str, str]]:
        """A request in a situation, as messages."""
        return [
            {"role": part.role, "content": part.content.format(situation=situation, request=request)}
            for part in self.prompt
        ]

    def _content(self, sentences: Iterable[str]) -> set[str]:
        """The words of sentences in lower case, without function words."""
        return {word for text in sentences for word in re.findall(r"[a-z]+", text.lower())} - {
            *self.words.function.split()
        }


def read_templates(file: Path) -> Templates:
    """Read a file of templates.

    Raises:
        ArmError: the file does not hold valid templates; in particular, phrasings must not share content words.
    """
    try:
        # TOML has lists where the templates have pairs
        return Templates.model_validate(read_toml(file), strict=False)
    except ValidationError as error:
        raise ArmError(f"{file}: {reasons(error)}") from error


@cache
def templates() -> Templates:
    """The default templates."""
    return read_templates(FILE)
