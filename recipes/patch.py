"""Patch a model from 1 to 16 bad transcripts: a fix, a monitor, and a page on what still goes wrong.

    steertune patch caught.jsonl --innocent traffic.jsonl
    steertune patch caught.jsonl --innocent traffic.jsonl --accept        # the sampled corrections, once reviewed
    steertune patch caught.jsonl --innocent traffic.jsonl --near near.jsonl --far far.jsonl --arm lora_neutral_sft

A catch is a prompt and a bad answer, optionally with the right answer: columns `prompt`, `bad` and `corrected`.
Missing corrections are sampled from the model with an instruction and written to `corrected.jsonl`, and the command
stops: review and edit the file, then continue with `--accept`. Any arm on pairs can be the fix: `vector_neutral_sft`
(one vector, whose strength can be lowered for every request), `lora_neutral_sft`, `vector_span_dpo` (a sum of existing
vectors); every key of the arm can be set (`--adapter.layers 10`). Arms with `neutral_kl` stay close to the base model
on the innocent traffic. `--near` and `--far` are bad transcripts for tests only. The same command continues an
interrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel

from steertune.adapters import monitors
from steertune.adapters.card import write_card
from steertune.adapters.description import write_description
from steertune.adapters.monitors import fits, pooling
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.checks import check_start
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model, model_has_template
from steertune.recipes.lab.descriptions import data_of
from steertune.recipes.lab.files import read_result, write_result
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.options import Argument, Option, Threads, arm_names
from steertune.recipes.lab.pages import write_page
from steertune.recipes.lab.processes import begin, device_of
from steertune.recipes.lab.progress import Bar, progress
from steertune.recipes.lab.rehearsal import rehearse_training
from steertune.recipes.lab.training import check_unfinished, claim, default_folder
from steertune.recipes.lab.transcripts import Transcripts
from steertune.recipes.patching import INSTRUCTION
from steertune.recipes.patching.case import CAUGHT, Case, check_pattern, dataset, read_case
from steertune.recipes.patching.cell import Cell
from steertune.recipes.patching.corrections import (
    FILE,
    for_review,
    read_corrections,
    sample_corrections,
    write_corrections,
)
from steertune.recipes.patching.page import card_of, patch_page
from steertune.recipes.patching.policy import Context, make_fix, strengths_of
from steertune.recipes.patching.watching import Watching, watch

_AGAIN = "Delete it to make it again."


class PatchTables(BaseModel):
    """The tables that identify a run; a run with other tables needs another folder."""

    arm: dict[str, Any]
    rows: str
    watching: dict[str, Any]


@command
def main(
    caught: Annotated[str, Argument(help="1 to 16 bad transcripts: a file or a name")],
    innocent: Annotated[str | None, Option(help="innocent transcripts, as many as you have")] = None,
    near: Annotated[str | None, Option(help="bad transcripts of the same kind, to test on")] = None,
    far: Annotated[str | None, Option(help="bad transcripts of other kinds, to test on")] = None,
    arm: Annotated[
        str, Option(help="the arm to train, one on pairs", autocompletion=arm_names, metavar="ARM")
    ] = "vector_neutral_sft",
    bad_pattern: Annotated[str | None, Option(help="a regular expression that matches bad answers")] = None,
    instruction: Annotated[str, Option(help="instruction with which missing corrections are sampled")] = INSTRUCTION,
    accept: Annotated[bool, Option("--accept", help="continue with the sampled corrections")] = False,
    sizes: Annotated[
        list[int] | None, Option(help="also make the fix from fewer catches (1 4)", metavar="N ...")
    ] = None,
    false_positives: Annotated[float, Option(help="largest share of innocent rows for the monitor to flag")] = 0.01,
    method: Annotated[str, Option(help="how the monitor is fitted: a file of adapters/monitors/fits/")] = "lda",
    pooled: Annotated[
        str, Option("--pooling", help="how token scores are pooled: a file of adapters/monitors/pooling/")
    ] = "mean",
    threads: Threads = None,
    folder: Annotated[Path | None, Option(help="output folder (runs/patch-CAUGHT)")] = None,
    overrides: Sequence[str] = (),
) -> Result:
    """Make the fix and the monitor, and write the page."""
    table = load_arm(arm, [*overrides, "--data.name", caught], recipe="patch")
    home = default_folder("patch", caught) if folder is None else folder
    watching = Watching(method, pooling.get(pooled))
    fits.get(method)
    begin(threads or table.model.threads, only_one=True)
    chat = partial(model_has_template, table.model)
    case = read_case(caught, innocent, {"near": near, "far": far}, chat, false_positives, sizes, bad_pattern)
    check_start(table, dataset([{"prompt": "-", "chosen": "-", "rejected": "-"}]))
    check_unfinished(home)
    with progress("Patch", 10):
        bar = Bar(10)
        with bar.step("model", 0.2):
            loaded: Any
            loaded, tokenizer = load_model(table.model)
            loaded = loaded.to(device_of())
        with bar.step("corrections", 0.8):
            corrected = _corrections(case, home, loaded, tokenizer, instruction, chat, table.evaluation.new_tokens)
        if corrected is not None and not (accept or (home / "config.json").exists()):
            return _to_review(corrected, home / FILE)
        case = case if corrected is None else replace(case, groups={**case.groups, CAUGHT: corrected})
        check_pattern(case.pattern, case.groups)
        tables = PatchTables(arm=table.model_dump(mode="json"), rows=case.digest(), watching=asdict(watching))
        claim(home, tables)
        context = Context.of(case, table, loaded, tokenizer)
        rehearse_training(table, loaded, tokenizer, readable(dataset(case.pairs(CAUGHT)), tokenizer))
        with bar.step("fixes", 9):
            cells = make_cells(context, home, watching)
    return _write(case, cells, tables.arm, caught, home)


def make_cells(context: Context, home: Path, watching: Watching) -> list[Cell]:
    """The fix of every size with its monitor; finished ones are read from the folder."""
    sizes = context.case.sizes
    bar = Bar(len(sizes))
    cells = []
    for count in sizes:
        folder = home if count == sizes[-1] else home / "sizes" / str(count)
        file = folder / "cell.json"
        if file.exists():
            cells.append(Cell.from_json(read_result(file, _AGAIN), file))
            bar.skip()
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with bar.step(f"{count} catch{'es' if count > 1 else ''}"):
            steps = Bar(4)
            with steps.step("training"):
                fixed, facts = make_fix(context, count, folder)
            strengths = strengths_of(context.arm, fixed) if count == sizes[-1] else [1.0]
            with steps.step("measuring", 2):
                records = context.measure(fixed, count, strengths)
            with steps.step("monitor"):
                watched = watch(context, fixed, count, records, watching)
            monitors.save(watched.monitor, folder / "monitor")
            cells.append(Cell(count, records, watched.result, facts))
            write_result(file, cells[-1].to_json())
    return cells


def _corrections(
    case: Case, home: Path, model: Any, tokenizer: Any, instruction: str, chat: Callable[[], bool], new_tokens: int
) -> Transcripts | None:
    """The catches with corrections sampled now or by an earlier run; None if every catch came with one."""
    if None not in case.caught.corrections:
        return None
    if (home / FILE).exists():
        return read_corrections(case.caught, home / FILE, chat)
    corrected = sample_corrections(model, tokenizer, case.caught, instruction, new_tokens, case.pattern)
    write_corrections(corrected, home / FILE)
    return corrected


def _to_review(corrected: Transcripts, file: Path) -> Result:
    """The corrections, for review before they are used."""
    text = (
        f"{for_review(corrected)}\nThe model wrote the corrections that were missing; nothing was trained. Read and "
        f"change them in {file}, then run the same command with --accept."
    )
    return Result({"corrections": str(file), "reviewed": False}, text)


def _write(case: Case, cells: list[Cell], arm: dict[str, Any], caught: str, home: Path) -> Result:
    title = f"A patch for {Path(caught).name}"
    file = write_page(patch_page(case, cells, arm, title, home), home)
    write_card(home / "adapter", card_of(case, cells[-1], arm, title))
    write_description(home / "adapter", data=data_of(dataset(case.pairs(CAUGHT)), Path(caught).name))
    result = {"caught": caught, "arm": arm["name"], "cells": [cell.to_json() for cell in cells]}
    write_result(home / "result.json", result)  # written last, since it marks the run as finished
    return Result(result, f"{file.read_text(encoding='utf-8')}\nThis page: {file.with_suffix('.html')}")


if __name__ == "__main__":
    sys.exit(main())
