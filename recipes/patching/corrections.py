"""Missing corrections: sampled from the model with an instruction, for a person to review.

`corrected.jsonl` holds the catches with their corrections. The reviewer can edit this file, and the command continues
with the edited version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from steertune.recipes.lab.files import ArmError, write_whole
from steertune.recipes.lab.generation import check_context, generate, plain
from steertune.recipes.lab.pages.verdict import circling
from steertune.recipes.lab.progress import track
from steertune.recipes.lab.similarity import text_of, words
from steertune.recipes.lab.transcripts import Transcripts, read_transcripts
from steertune.recipes.patching.case import dataset
from steertune.trainers import get_view

FILE = "corrected.jsonl"
_TRIES = 8
_TEMPERATURE = 1.0


def sample_corrections(
    model: Any, tokenizer: Any, caught: Transcripts, instruction: str, new_tokens: int, pattern: str | None
) -> Transcripts:
    """The catches, with missing corrections sampled from the model with an instruction.

    The greedy answer is tried first, then samples, until one is neither empty nor the bad answer, does not match the
    pattern, and does not repeat itself.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        caught: The catches.
        instruction: Text in front of the prompt.
        new_tokens: Maximum length of an answer.
        pattern: A regular expression that matches bad answers; None: they are not recognised.

    Raises:
        ArmError: the model gives no usable answer to one of the prompts; the message names its place.
    """
    view = get_view("instruction", text=instruction)
    corrections = list(caught.corrections)
    rows = caught.rows.to_list()
    missing = [i for i, correction in enumerate(corrections) if correction is None]
    shown = [dict(row)["prompt"] for row in view([rows[i] for i in missing])]
    check_context(model, tokenizer, dataset([{"prompt": prompt} for prompt in shown]), new_tokens, "--instruction")
    for i, prompt in track([*zip(missing, shown, strict=True)], "correction"):
        bad = text_of(rows[i]["completion"])
        answer = _first_good(model, tokenizer, prompt, new_tokens, lambda text, bad=bad: _is_bad(text, bad, pattern))
        if answer is None:
            raise ArmError(
                f"{caught.place(i)}: the model gave no other answer with the instruction in {_TRIES + 1} tries. "
                "Write the correction yourself (column corrected), or give another --instruction."
            )
        as_messages = isinstance(rows[i]["completion"], list)
        corrections[i] = [{"role": "assistant", "content": answer}] if as_messages else f" {answer}"
    return replace(caught, corrections=corrections)


def write_corrections(caught: Transcripts, file: Path) -> None:
    """Write the catches with their corrections as JSON lines, for a person to review."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"prompt": row["prompt"], "bad": text_of(row["completion"]).strip(), "corrected": text_of(correction).strip()}
        for row, correction in zip(caught.rows.to_list(), caught.corrections, strict=True)
    ]
    write_whole(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_corrections(caught: Transcripts, file: Path, chat: Callable[[], bool]) -> Transcripts:
    """The catches with the corrections of a file that `write_corrections` wrote.

    Raises:
        ArmError: the file holds other catches, or a row without a correction.
    """
    reviewed = read_transcripts(str(file), "bad", chat)
    prompts = [[text_of(row["prompt"]) for row in part.rows.to_list()] for part in (caught, reviewed)]
    if prompts[0] != prompts[1]:
        raise ArmError(f"{file} holds the corrections of other catches. Delete it, or choose another --folder.")
    if None in reviewed.corrections:
        place = reviewed.place(reviewed.corrections.index(None))
        raise ArmError(f"{place} has no correction. Write the right answer (column corrected).")
    return replace(caught, corrections=reviewed.corrections, place=reviewed.place)


def for_review(caught: Transcripts) -> str:
    """The catches and their corrections as text."""
    lines = []
    for row, correction in zip(caught.rows.to_list(), caught.corrections, strict=True):
        prompt, bad, good = plain(row["prompt"]), text_of(row["completion"]), text_of(correction)
        lines += [f"prompt:    {prompt!r}", f"caught:    {bad.strip()!r}", f"corrected: {good.strip()!r}", ""]
    return "\n".join(lines)


def _first_good(model: Any, tokenizer: Any, prompt: Any, new_tokens: int, is_bad: Callable[[str], bool]) -> str | None:
    for attempt in range(_TRIES + 1):
        temperature = _TEMPERATURE if attempt else 0.0
        [text] = generate(model, tokenizer, [prompt], new_tokens, temperature, seed=attempt)
        answer = _whole_sentences(text)
        if not is_bad(answer):
            return answer
    return None


def _is_bad(text: str, bad: str, pattern: str | None) -> bool:
    matches = pattern is not None and re.search(pattern, text, re.IGNORECASE) is not None
    return not text or words(text) == words(bad) or matches or circling([text]) > 0


def _whole_sentences(text: str) -> str:
    """A text without the last sentence if that was cut off, unless it is the only one."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else text.strip()
