"""Chat with the base and the steered model side by side, and change the strength during the chat.

    python -m steertune.recipes.chat runs/vector_dpo-cautious_advice/adapter

Each model remembers its own answers. A line that starts with / is a command:

    /strength 2     use this strength from now on; negative is the opposite
    /both  /alone   with or without the base model
    /reset          forget the conversation
    /quit           (or the end of the input)
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from peft import PeftModel

from steertune.recipes.lab.command_line import command
from steertune.recipes.lab.data import load_steered
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.forms import has_template
from steertune.recipes.lab.generation import check_strength, generate, prompt_lengths
from steertune.recipes.lab.options import Argument, Base, Count, Option, Threads
from steertune.recipes.lab.processes import begin
from steertune.trainers import context_length, scaled

_HELP = "Commands: /strength NUMBER, /both, /alone, /reset, /quit"


@command
def main(
    folder: Annotated[Path, Argument(help="adapter folder")],
    model: Base = None,
    strength: Annotated[float, Option(help="strength at the start")] = 1.0,
    new_tokens: Annotated[int, Count("tokens of the longest answer")] = 60,
    temperature: Annotated[float, Option(help="0 is greedy")] = 0.0,
    threads: Threads = None,
) -> None:
    """Answer typed lines until the input ends."""
    check_settings(strength, new_tokens, temperature)
    begin(threads, only_one=True)
    steered, tokenizer, _ = load_steered(folder, model)
    chat = Chat(steered, tokenizer, strength, new_tokens, temperature)
    print(_HELP)
    if not has_template(tokenizer):
        print("The tokenizer has no chat template: every line is a separate prompt, continued as plain text.")
    for line in chat.talk(_typed()):
        print(line, flush=True)


def check_settings(strength: float, new_tokens: int, temperature: float) -> None:
    """Raise a ValueError unless strength and temperature are finite and `new_tokens` is at least 1."""
    if not math.isfinite(strength) or new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError(
            f"strength={strength}, new_tokens={new_tokens}, temperature={temperature}: strength must be finite, "
            "new_tokens 1 or more, and temperature finite and 0 or more."
        )


class Chat:
    """Two conversations with one model: at strength 0 and at `strength`.

    Raises:
        ValueError: see `check_settings` and `check_strength`.
    """

    def __init__(self, model: PeftModel, tokenizer: Any, strength: float, new_tokens: int, temperature: float) -> None:
        check_settings(strength, new_tokens, temperature)
        check_strength(model, strength)
        self.model, self.tokenizer = model, tokenizer
        self.strength, self.new_tokens, self.temperature = strength, new_tokens, temperature
        self.both = True
        self._histories: dict[str, list[dict[str, str]]] = {"base": [], "steered": []}

    def talk(self, lines: Iterable[str]) -> Iterable[str]:
        """Yield what to print for every typed line."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/"):
                yield self._command(*text[1:].split())
            elif text:
                yield from self._answers(text)

    def _command(self, name: str = "", *words: str) -> str:
        if name == "strength" and len(words) == 1:
            try:
                value = float(words[0])
            except ValueError:
                return f"{words[0]!r} is not a number."
            if not math.isfinite(value):
                return f"{words[0]!r} is not finite."
            try:
                check_strength(self.model, value)
            except ArmError as error:
                return str(error)
            self.strength = value
            return f"Strength {value:g}."
        if name in ("both", "alone") and not words:
            self.both = name == "both"
            return "With the base model." if self.both else "Without the base model."
        if name == "reset" and not words:
            for history in self._histories.values():
                history.clear()
            return "Forgotten."
        return _HELP

    def _answers(self, text: str) -> Iterable[str]:
        sides = {"base": 0.0, "steered": self.strength}
        for side, strength in sides.items():
            if side == "base" and not self.both:
                continue
            history = self._histories[side]
            messages = [*history, {"role": "user", "content": text}]
            prompt: Any = messages if has_template(self.tokenizer) else text
            context = context_length(self.model.config, self.tokenizer)
            [tokens] = prompt_lengths(self.tokenizer, [prompt])
            if context is not None and tokens + self.new_tokens > context:
                yield (
                    f"This takes {tokens} tokens and its answer up to {self.new_tokens}, the model reads {context}. "
                    "Forget the conversation with /reset, type a shorter line, or lower --new-tokens."
                )
                return
            try:
                with scaled(self.model, strength):
                    [answer] = generate(self.model, self.tokenizer, [prompt], self.new_tokens, self.temperature)
            except Exception as error:  # the chat can continue at another strength, or after /reset
                yield f"{side}: no answer: {type(error).__name__}: {error}"
                continue
            history[:] = [*messages, {"role": "assistant", "content": answer}]
            yield f"{'base' if side == 'base' else f'{strength:+g}'}> {answer or '(an empty answer)'}"


def _typed() -> Iterable[str]:
    """Lines of standard input, with a prompt on a terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 does not end the chat
    while True:
        try:
            yield input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    sys.exit(main())
