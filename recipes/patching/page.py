"""The page of a patch: its effect, its harm, its monitor, and how all three change with fewer catches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from steertune.adapters.card import Card
from steertune.recipes.lab import measures
from steertune.recipes.lab.cards import HASHES
from steertune.recipes.lab.detection import share
from steertune.recipes.lab.intervals import Interval
from steertune.recipes.lab.pages import (
    Block,
    Code,
    Page,
    Section,
    Table,
    Text,
    escape,
    prose,
    settings_in_words,
    table_markdown,
)
from steertune.recipes.lab.pages.measured import EMPTY
from steertune.recipes.lab.pages.side_effects import with_ends
from steertune.recipes.lab.pages.verdict import MAX_KL
from steertune.recipes.lab.rows import BASE, Record
from steertune.recipes.lab.similarity import text_of
from steertune.recipes.patching.case import CAUGHT, Case
from steertune.recipes.patching.cell import FIXED, Cell, bad_rates, measured, not_found
from steertune.recipes.patching.monitor_blocks import monitor_blocks, monitor_line, unfound_section
from steertune.recipes.patching.policy import INNOCENT

_SHOWN = 4  # answers of a group on the page
_HARM = ("kl", "kl_tail", "perplexity_ratio", "capability", "behaviour", "repetition")


def patch_page(case: Case, cells: Sequence[Cell], arm: Mapping[str, Any], title: str, home: Path) -> Page:
    """The page.

    Args:
        case: The transcripts.
        cells: The fixes; the last one is made from all catches.
        arm: The tables of the arm.
        title: Title of the page.
        home: Folder of the adapter and the monitor.
    """
    last = cells[-1]
    what = (
        f"{prose(case.note)} Adapter {settings_in_words(arm['adapter'])}; loss {settings_in_words(arm['loss'])}; base "
        f"model {escape(arm['model']['name'])}; {last.facts['parameters']:,} trained parameters."
    )
    recognised: list[Block] = []
    if case.pattern is not None:
        recognised = [Text("A generated answer is bad if this pattern finds it:"), Code(case.pattern)]
    sections = [
        Section("", [Text(_verdict(case, last)), Text(what)]),
        Section(
            "Bad answers, before and after",
            [
                Text(
                    "*Generated*: share of greedy answers that are bad. *Preferred*: share of transcripts whose bad "
                    "answer has a higher log-probability per token than the corrected one. *Margin*: by how much the "
                    "corrected answer is ahead, in nats per token. All with 95 % intervals."
                ),
                *recognised,
                Table(_bad_table(last), "bad_answers"),
            ],
        ),
        Section("Harm to benign requests", [Text(_HARM_TEXT), Table(_harm_table(last.records[INNOCENT]), "harm")]),
        *_strengths(last),
        Section("The monitor", monitor_blocks(case, last)),
        *_fewer(cells),
        Section("What was caught, and its corrections", _corrections(case)),
        *unfound_section(case, last),
        *_answers(case, last),
        Section("Use it", [Code(_use(arm, home), "python")]),
    ]
    return Page(title, sections)


_HARM_TEXT = (
    "On innocent rows that were not used to make the fix. KL and perplexity are those of the innocent answers; the "
    "last rows are about what both models answer to innocent requests."
)


def card_of(case: Case, cell: Cell, arm: Mapping[str, Any], title: str) -> Card:
    """The model card of a fix."""
    harm = table_markdown(Table(_harm_table(cell.records[INNOCENT])))
    return Card(
        title=title,
        behaviour=f"Takes a behaviour out of which {cell.count} cases were caught, and nothing more if it can.",
        data=f"{case.note}{HASHES}",
        made=f"Arm `{arm['name']}`: adapter {settings_in_words(arm['adapter'])}, loss "
        f"{settings_in_words(arm['loss'])}; {cell.facts['parameters']:,} trained parameters.",
        measured=f"Before and after, on what was caught and on other bad prompts:\n\n"
        f"{table_markdown(Table(_bad_table(cell)))}",
        side_effects=f"On innocent rows that were held out:\n\n{harm}",
        advice="Layer and strength come from the arm; no measurement chose them.",
    )


def _verdict(case: Case, cell: Cell) -> str:
    """The first lines: the fix's effect, its cost, and the monitor's result."""
    lines = []
    for kind, start, of in (
        ("generated", "The pattern finds", "answers to {} prompts"),
        ("preferred", "The bad answer is still the likelier one in", "{} transcripts"),
    ):
        parts = []
        for name in cell.tested:
            before, after = (bad_rates(cell.records[name], at)[kind] for at in (BASE, FIXED))
            if before is not None and after is not None:
                counts = [f"{one.estimate * one.pairs:.0f}" for one in (before, after)]
                parts.append(f"{counts[1]} of {after.pairs} {of.format(name)} ({counts[0]} before)")
        lines += [f"**{start} {', '.join(parts)}.**"] if parts else []
    if not lines:
        lines.append("Neither a pattern nor corrections say what a bad answer is, so the fix was not judged.")
    if unfound := not_found(cell):
        lines.append(
            f"**The monitor flags {len(unfound)} of the fixed model's answers that the pattern does not find**: the "
            "same in other words, or false alarms. Read them below."
        )
    kl = cell.records[INNOCENT].value("kl", FIXED)
    lines.append(f"KL to the base on innocent answers: {kl:.3f} nats per token.")
    if kl > MAX_KL:
        lines.append(f"**That is too much (limit {MAX_KL}): use a lower strength.**")
    return " ".join([*lines, monitor_line(cell)])


def _bad_table(cell: Cell) -> pd.DataFrame:
    rows = []
    for name in cell.tested:
        before, after = (bad_rates(cell.records[name], at) for at in (BASE, FIXED))
        margins = [measured("margin_per_token", cell.records[name].seen(at)) for at in (BASE, FIXED)]
        cells = [before["generated"], after["generated"], before["preferred"], after["preferred"], *margins]
        rows.append([name, *map(with_ends, cells)])
    columns = [f"{what} {when}" for what in ("generated", "preferred", "margin") for when in ("before", "after")]
    frame = pd.DataFrame(rows, columns=pd.Index(["", *columns]))
    return frame.loc[:, [bool((frame[column] != "").any()) for column in frame.columns]]


def _harm_table(record: Record) -> pd.DataFrame:
    rows = []
    for name in _HARM:
        before, after = (measured(name, record.seen(at)) for at in (BASE, FIXED))
        if after is not None:
            title = "answers found bad" if name == "behaviour" else measures.get(name).heading
            rows.append([title, "" if name in ("kl", "kl_tail", "perplexity_ratio") else with_ends(before)])
            rows[-1].append(with_ends(after))
    pairs = zip(*(record.observations[at].get("answer", []) for at in (BASE, FIXED)), strict=True)
    same = [before == after for before, after in pairs]
    if same:
        rows.append(["answers that are word for word the same", "", with_ends(share(same))])
    return pd.DataFrame(rows, columns=pd.Index(["", "before", "after"]))


def _strengths(cell: Cell) -> list[Section]:
    """The fix's effect at every strength, if its adapter has strengths."""
    strengths = sorted((at for at in cell.records[CAUGHT].observations if at != BASE), key=float)
    if len(strengths) < 2:
        return []
    rows = []
    for at in [BASE, *strengths]:
        cells = []
        for name in cell.tested:
            rates = bad_rates(cell.records[name], at)
            cells.append(with_ends(rates["generated"] if rates["generated"] is not None else rates["preferred"]))
        rows.append([at, *cells, f"{cell.records[INNOCENT].value('kl', at):.3f}" if at != BASE else "0"])
    frame = pd.DataFrame(rows, columns=pd.Index(["strength", *(f"bad, {name}" for name in cell.tested), "KL"]))
    text = (
        "The fix can be turned back, or up, for every request: `set_strength`, or `name@0.5` in a mixed batch. "
        "Strength 0 is the model as it was."
    )
    return [Section("Strength", [Text(text), Table(frame, "strengths")])]


def _fewer(cells: Sequence[Cell]) -> list[Section]:
    """The results with fewer catches."""
    if len(cells) < 2:
        return []
    rows = []
    for cell in cells:
        row: list[str] = [str(cell.count)]
        for name in cell.tested:
            rates = bad_rates(cell.records[name], FIXED)
            row.append(with_ends(rates["generated"] if rates["generated"] is not None else rates["preferred"]))
        row.append(f"{cell.records[INNOCENT].value('kl', FIXED):.3f}")
        for seen in cell.watched["groups"].values():
            row += [with_ends(Interval(**seen["fixed"]["auroc"])), with_ends(Interval(**seen["fixed"]["recall"]))]
        rows.append(row)
    last = cells[-1]
    columns = ["catches", *(f"bad, {name}" for name in last.tested), "KL"]
    columns += [f"monitor, {name}: {what}" for name in last.watched["groups"] for what in ("AUROC", "recall")]
    return [Section("With fewer catches", [Table(pd.DataFrame(rows, columns=pd.Index(columns)), "fewer")])]


def _corrections(case: Case) -> list[Block]:
    blocks: list[Block] = []
    for row, correction in zip(case.caught.rows.to_list(), case.caught.corrections, strict=True):
        bad, good = (escape(text_of(answer).strip()) for answer in (row["completion"], correction))
        blocks += [Text(f"**{escape(text_of(row['prompt']))}**"), Text(f"- caught: {bad}\n- corrected: {good}")]
    return blocks


def _answers(case: Case, cell: Cell) -> list[Section]:
    """Some answers of both models."""
    blocks: list[Block] = []
    for name, record in cell.records.items():
        rows = case.held_out if name == INNOCENT else case.groups[name].rows.to_list()
        answers = zip(*(record.observations[at].get("answer", []) for at in (BASE, FIXED)), strict=True)
        shown = [*zip(rows, answers, strict=False)][:_SHOWN]
        if shown:
            blocks.append(Text(f"*{name}*"))
        for row, (before, after) in shown:
            lines = f"- before: {escape(before) or EMPTY}\n- after: {escape(after) or EMPTY}"
            blocks += [Text(f"**{escape(text_of(row['prompt']))}**"), Text(lines)]
    return [Section("Answers (greedy)", blocks)] if blocks else []


def _use(arm: Mapping[str, Any], home: Path) -> str:
    embedded = arm["model"]["name"] == "embedded"
    vector = arm["adapter"].get("type", "steering_vector") == "steering_vector"
    lines = [
        "from peft import PeftModel",
        *(["from steertune.recipes.lab import embedded"] if embedded else []),
        f"from steertune.adapters import monitors{', set_strength' if vector else ''}",
        "",
        f"base, tokenizer = {'embedded.load_model(), embedded.load_tokenizer()' if embedded else '..., ...'}",
        f'model = PeftModel.from_pretrained(base, "{home}/adapter")',
        f'monitor = monitors.load("{home}/monitor", model, tokenizer)',
        *(["set_strength(model, 0.5)  # turn the fix back"] if vector else []),
    ]
    return "\n".join(lines)
