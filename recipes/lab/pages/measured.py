"""Blocks of pages about one model: its measures before, after and by strength, a figure, its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steertune.recipes.lab import measures
from steertune.recipes.lab.pages import Block, Code, Page, Section, Table, Text, escape, table_of
from steertune.recipes.lab.pages.side_effects import BESIDE, of_strengths
from steertune.recipes.lab.pages.verdict import verdict
from steertune.recipes.lab.rows import BASE, Record

EMPTY = "*(an empty answer)*"
_EVERY = "Every measure, trusted ones first (`docs/pages/measures.md` says what each one sees):"
_SCORES = (
    "In brackets is each answer's score: 1 if it shows the behaviour and 0 if not; of a classifier, the probability "
    "that it is one of the chosen answers. A rule of your own is more exact: `behaviour.toml` beside the data "
    "(`docs/pages/extend.md`)."
)


def number(value: float) -> str:
    """A mean on a page: three decimals, or two digits where that would be 0."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:#.2g}"


def title(name: str) -> str:
    """The heading of a measure on a page, with its unit."""
    return measures.get(name).heading


def measured(columns: Sequence[Mapping[str, float]]) -> list[str]:
    """Names of the measures that any of the columns has, trusted ones first."""
    return [name for name in measures.ranked() if any(name in column for column in columns)]


def comparison(
    columns: Mapping[str, Mapping[str, float]], name: str = "measures", only: Sequence[str] | None = None
) -> Table:
    """A table with a row for every measure, or for those named by `only`. `columns` maps the name of a model to its
    means, from `Record.means`."""
    rows = [
        [title(measure), *(number(column[measure]) if measure in column else "" for column in columns.values())]
        for measure in measured([*columns.values()])
        if only is None or measure in only
    ]
    return table_of(["", *columns], rows, name)


def by_strength(means: Mapping[str, Mapping[str, float]]) -> Table:
    """A table with a row for every measure and a column for every strength."""
    return comparison({f"strength {at}": means[at] for at in sorted(means, key=float)}, "strengths")


def generations(
    prompts: Sequence[str], answers: Mapping[str, Sequence[str]], scores: Mapping[str, Sequence[float]] | None = None
) -> list[Block]:
    """Prompts with the answers of several models. `answers` maps the name of a model to its answers, `scores` to what
    the scorer gave them."""
    blocks: list[Block] = []
    for i, prompt in enumerate(prompts if answers else ()):
        lines = []
        for name, texts in answers.items():
            score = f" ({scores[name][i]:.2f})" if scores and name in scores and scores[name][i] is not None else ""
            lines.append(f"- {name}{score}: {escape(texts[i]) or EMPTY}")
        blocks += [Text(f"**{escape(prompt)}**"), Text("\n".join(lines))]
    return blocks


def training_page(record: Record, what: str, use: Sequence[str]) -> Page:
    """The page of a training. `what` describes the model and the data, and `use` are the lines of Python that load the
    adapter."""
    means, facts = record.means(), record.facts
    summary: list[Block] = [Text(verdict(record)), Text(what), *map(Text, facts["notes"].values())]
    summary.append(comparison({"before": means[BASE], "after": means["1"]}, only=BESIDE))
    strengths = [*of_strengths(record), Text(_EVERY), by_strength(means)]
    cost = (
        f"{facts['parameters']:,} trained parameters, {facts['train_seconds']:.0f} s of training "
        f"({facts['steps']} steps), {facts['seconds']:.0f} s in all, {facts['peak_memory_gb']:.2f} GB peak memory, "
        f"{facts['processes']} process(es)."
    )
    names = {at: "base" if at == BASE else f"strength {at}" for at in record.observations}
    texts = {names[at]: seen["answer"] for at, seen in record.observations.items() if "answer" in seen}
    scores = {names[at]: seen["score"] for at, seen in record.observations.items() if "score" in seen}
    answers, prompts = generations(facts["prompts"], texts, scores), facts.get("asked", "held-out")
    if facts.get("scorer"):
        answers.insert(0, Text(f"What counts as the behaviour: {escape(facts['scorer'])}. {_SCORES}"))
    sections = [
        Section("", summary),
        Section("Strength", strengths),
        *([Section(f"Generations (greedy, {prompts} prompts)", answers)] if answers else []),
        Section("Cost", [Text(cost)]),
        Section("Use it", [Code("\n".join(use), "python")]),
    ]
    return Page(str(record.keys["arm"]), sections)
