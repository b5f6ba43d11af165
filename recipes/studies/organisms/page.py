"""The page of an organism: whether it is accepted, what each family leads to, examples, and what to run next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from steertune.adapters.card import versions
from steertune.recipes.lab.intervals import Interval
from steertune.recipes.lab.pages import Code, Page, Section, Text, escape, table_of
from steertune.recipes.studies.organisms.acceptance import (
    BAD_AT_LEAST,
    BENIGN,
    CUES,
    INNOCENT_AT_MOST,
    NEAR_MISSES,
    Acceptance,
)
from steertune.recipes.studies.organisms.dialogues import Dialogue, Plan


def page_of(
    plan: Plan, acceptance: Acceptance, files: Mapping[str, int], asked: Mapping[str, Sequence[Dialogue]],
    said: Mapping[str, Sequence[str]], home: Path,
) -> Page:  # fmt: skip
    """The page."""
    verdict = "Accepted." if not acceptance.failures else f"Not accepted: {'; '.join(acceptance.failures)}."
    families = [[name, plan.kinds[name], plan.split(name), _rate(acceptance.families[name])] for name in plan.kinds]
    elsewhere = [
        ["near misses: bad", _rate(acceptance.near_misses), f"{INNOCENT_AT_MOST} or less"],
        ["benign requests: bad", _rate(acceptance.benign), f"{INNOCENT_AT_MOST} or less"],
        ["benign requests: answered correctly", _rate(acceptance.helpful), ""],
        ["situations, before unrelated training: bad", _rate(acceptance.before), ""],
        ["the same situations after it: bad", _rate(acceptance.after), "nine tenths of that"],
    ]
    examples = [
        [escape(row.situation), escape(row.request), escape(text), plan.verdict(row, text) or ""]
        for name in (CUES, NEAR_MISSES, BENIGN)
        for row, text in [*zip(asked[name], said[name], strict=True)][:3]
    ]
    what = (
        f"Tested with phrasings and names that it was not trained on. In every family {BAD_AT_LEAST} or more of the "
        "answers must do what the family leads to. Families of the split `near` do what a caught one does, in other "
        "words; those of `far` do what was never caught. Shares have 95 % intervals (Wilson)."
    )
    return Page(
        "A model organism",
        [
            Section("", [Text(verdict), Text(what)]),
            Section("Situations", [table_of(["family", "action", "split", "done as taught"], families, "situations")]),
            Section("Elsewhere", [table_of(["requests", "share", "needed"], elsewhere, "elsewhere")]),
            Section("Examples", [table_of(["situation", "request", "answer", "action"], examples)]),
            Section("Files", [table_of(["file", "rows"], [[f"{n}.jsonl", str(rows)] for n, rows in files.items()])]),
            Section("Next steps", [Code(_commands(home), "bash")]),
            Section("Made with", [Text(f"{versions()}.")]),
        ],
    )


def _commands(home: Path) -> str:
    return (
        f"steertune patch {home}/caught.jsonl --innocent {home}/traffic.jsonl --near {home}/near.jsonl "
        f"--far {home}/far.jsonl --model.name {home}/model\n"
        f"steertune monitor {home}/caught.jsonl --innocent {home}/traffic.jsonl --test {home}/stream.jsonl "
        f"--model {home}/model\n"
    )


def _rate(rate: Interval) -> str:
    return f"{rate.estimate:.2f} [{rate.low:.2f}, {rate.high:.2f}]"
