"""Limits on prompts and answers, and how a prompt becomes token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steertune.recipes.lab.files import ArmError, shown
from steertune.recipes.lab.forms import ROLES, has_template
from steertune.recipes.lab.generation import prompt_ids
from steertune.recipes.serving.defaults import LONGEST
from steertune.trainers import context_length


@dataclass(frozen=True)
class Limits:
    """The maximum lengths of prompts and answers.

    Attributes:
        context: The model's context length in tokens; None: limited by memory only.
        longest: Maximum length of an answer, in tokens.
    """

    context: int | None
    longest: int = LONGEST

    @classmethod
    def of(cls, model: Any, tokenizer: Any, longest: int = LONGEST) -> Limits:
        """The limits of a model."""
        return cls(context_length(model.config, tokenizer), longest)

    def check(self, prompt: Sequence[int], new_tokens: int, name: str) -> None:
        """Refuse an answer that is too long by itself or together with its prompt.

        Args:
            prompt: Token ids.
            new_tokens: Maximum length of the answer.
            name: The name of `new_tokens` in the request.

        Raises:
            ArmError: the message names the length and the limit.
        """
        self.check_length(new_tokens, name)
        if not prompt:
            raise ArmError("The prompt has no tokens. Send one with text.")
        tokens = len(prompt) + new_tokens
        if self.context is not None and tokens > self.context:
            raise ArmError(
                f"The prompt and its answer take {tokens} tokens, the model reads {self.context}. Send a shorter "
                f"prompt, or a smaller {name}."
            )

    def check_length(self, new_tokens: int, name: str) -> None:
        """Raise an ArmError if an answer is longer than the maximum."""
        if new_tokens > self.longest:
            raise ArmError(f"{name}={shown(new_tokens)}: at most {self.longest} are allowed (--longest).")

    def room(self, prompt: Sequence[int]) -> int:
        """The largest number of tokens that an answer to this prompt can have."""
        return self.longest if self.context is None else max(0, min(self.longest, self.context - len(prompt)))


def read_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a prompt: a text, or messages, which the chat template formats.

    Raises:
        ArmError: it cannot be read.
    """
    if not isinstance(prompt, str):
        if not has_template(tokenizer):
            raise ArmError("prompt is a list of messages, but the tokenizer has no chat template. Give text.")
        if not all({"role", "content"} <= {*part} for part in prompt):
            raise ArmError("prompt: every message needs a role and content.")
        if unknown := [part["role"] for part in prompt if part["role"] not in ROLES]:
            raise ArmError(f"prompt: the role {shown(unknown[0])} must be one of {', '.join(ROLES)}.")
    try:
        return prompt_ids(tokenizer, [prompt])[0]
    except Exception as error:  # a chat template is a program, and can raise any error
        raise ArmError(f"The prompt cannot be read: {type(error).__name__}: {error}") from error
