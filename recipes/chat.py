"""Talk to the base and the steered model side by side, and change the strength while talking.

    python -m steertune.recipes.chat runs/vector_dpo-cautious_advice/adapter

Each side remembers its own answers. A line that starts with / is a command:

    /strength 2     from now on; negative is the opposite
    /both  /alone   with the base model beside, or without
    /reset          forget the conversation
    /quit           (or the end of the input)
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from steertune.recipes.lab.data import load_steered
from steertune.recipes.lab.measures import generate
from steertune.recipes.lab.processes import command, positive
from steertune.trainers import scaled

_HELP = "Commands: /strength NUMBER, /both, /alone, /reset, /quit"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="chat", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="adapter folder")
    parser.add_argument("--model", help="base model: embedded, a local folder or a Hub name (the adapter's own)")
    parser.add_argument("--strength", type=float, default=1.0, help="at the start (1)")
    parser.add_argument("--new-tokens", type=positive, default=60, help="longest answer (60)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    options = parser.parse_args(argv)
    check_settings(options.strength, options.new_tokens, options.temperature)
    steered, tokenizer, _ = load_steered(options.folder, options.model)
    chat = Chat(steered, tokenizer, options.strength, options.new_tokens, options.temperature)
    print(_HELP)
    for said in chat.talk(_typed()):
        print(said, flush=True)
    return 0


def check_settings(strength: float, new_tokens: int, temperature: float) -> None:
    """Raise a ValueError for a strength or temperature that is not finite, or an answer without tokens."""
    if not math.isfinite(strength) or new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError(
            f"strength={strength}, new_tokens={new_tokens}, temperature={temperature}: a finite strength, a token "
            "or more, and a temperature of 0 or above."
        )


class Chat:
    """Two conversations with one model: at strength 0 and at `strength`.

    Args:
        model: The steered model.
        tokenizer: With a chat template; without one every line is continued for itself.
        strength: Of the adapter.
        new_tokens: Longest answer.
        temperature: 0 is greedy.

    Raises:
        ValueError: see `check_settings`.
    """

    def __init__(self, model: PeftModel, tokenizer: Any, strength: float, new_tokens: int, temperature: float) -> None:
        check_settings(strength, new_tokens, temperature)
        self.model, self.tokenizer = model, tokenizer
        self.strength, self.new_tokens, self.temperature = strength, new_tokens, temperature
        self.both = True
        self._histories: dict[str, list[dict[str, str]]] = {"base": [], "steered": []}

    def talk(self, lines: Iterable[str]) -> Iterable[str]:
        """What is to be printed for every line that was typed."""
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
                return f"{words[0]!r} is no number."
            if not math.isfinite(value):
                return f"{words[0]!r} is not finite."
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
            history.append({"role": "user", "content": text})
            prompt: Any = history if self.tokenizer.chat_template else text
            with scaled(self.model, strength):
                [answer] = generate(self.model, self.tokenizer, [prompt], self.new_tokens, self.temperature)
            history.append({"role": "assistant", "content": answer})
            yield f"{'base' if side == 'base' else f'{strength:+g}'}> {answer}"


def _typed() -> Iterable[str]:
    """Lines of the standard input; with a prompt where a person types."""
    while True:
        try:
            yield input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    sys.exit(main())
