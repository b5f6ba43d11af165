"""The results of a sweep, and its page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from steertune.recipes.lab import measures
from steertune.recipes.lab.intervals import interval, of_measure
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.pages import Block, Code, Figure, Page, Section, Table, Text, escape, prose, table_of
from steertune.recipes.lab.pages.measured import comparison, generations, measured, number, title
from steertune.recipes.lab.pages.side_effects import BESIDE, of_strengths, with_ends
from steertune.recipes.lab.rows import BASE, Record, label
from steertune.recipes.sweeping import plots
from steertune.recipes.sweeping.choose import (
    UNRELIABLE,
    Choice,
    Reliability,
    Setting,
    choose,
    deciding,
    excesses,
    place,
    reliability,
    settings_of,
)
from steertune.recipes.sweeping.settings import SweepTable


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep.

    Attributes:
        table: The request.
        records: One record for every place, measured on validation rows.
        command: The command line.
        scorer: How the behaviour was scored; None if it was not.
        versions: Versions of the packages.
        split: How a single file was divided; empty if there were several.
        test: The recommended setting on test rows; None: no setting is recommended.
        prompts: Test prompts that were answered, as plain text.
        neutral_prompts: Neutral prompts that were answered, as plain text.
        seconds: Duration of the sweep.
        notes: Notes on the rows.
    """

    table: SweepTable
    records: list[Record]
    command: str
    scorer: str | None
    versions: str
    split: str = ""
    test: Record | None = None
    prompts: tuple[str, ...] = ()
    neutral_prompts: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> list[Setting]:
        """The settings that did not diverge."""
        return settings_of(self.records)

    @cached_property
    def choice(self) -> Choice:
        """The recommendation."""
        return choose(self.settings, self.table.limits)

    @property
    def shown(self) -> Setting | None:
        """The recommended setting, or the one with the largest mean effect if none is recommended."""
        return self.choice.setting or max(self.settings, key=lambda one: one.value("margin_gain"), default=None)

    @property
    def tested(self) -> Setting:
        """The recommended setting on test rows, if there is one."""
        assert self.test is not None and self.choice.setting is not None
        return Setting(self.test, self.choice.setting.strength)

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`."""
        choice = self.choice
        names = ("site", "layer", "strength")
        return {
            "settings": self.table.model_dump(mode="json"),
            "command": self.command,
            "records": [record.to_json() for record in self.records],
            "recommended": None if choice.setting is None else {name: getattr(choice.setting, name) for name in names},
            "reason": choice.reason,
            "test": None if self.test is None else self.test.to_json(),
            "scorer": self.scorer,
            "versions": self.versions,
            "split": self.split,
            "seconds": self.seconds,
        }


def page_of(result: Sweep) -> Page:
    """The page."""
    table = result.table
    heading = f"{Path(table.task).name}: {table.what.replace('`', '')}, layers × strengths"
    sections = [
        _recommended(result), _maps(result), _side_effects(result), _evenness(result), _table(result),
        _answers(result), _how(result),
    ]  # fmt: skip
    return Page(heading, [section for section in sections if section is not None])


def warning(slopes: Reliability) -> str:
    """The warning about a setting that moves many examples the wrong way."""
    return (
        f"**Unreliable.** {slopes.wrong} of {len(slopes.slopes)} held-out examples ({slopes.share:.0%}, 95 % interval "
        f"{slopes.low:.0%} to {slopes.high:.0%}) move the wrong way; from {UNRELIABLE:.0%} on, the mean effect says "
        "little about the next example. More or cleaner pairs, another layer or another direction may help."
    )


def _recommended(result: Sweep) -> Section:
    choice = result.choice
    if choice.setting is None:
        return Section("Recommended: leave the model as it is", [Text(choice.reason)])
    slopes, tested = reliability(choice.setting), result.tested
    warned = [Text(warning(slopes))] if slopes.unreliable else []
    read_once = f"On {len(tested.rows('margin'))} test pairs and on the other half of the neutral text, read once:"
    blocks = [Text(choice.reason), *warned, Text(read_once), on_test(tested), *_use(choice.setting)]
    return Section(f"Recommended: {place(choice.setting)}", blocks)


def on_test(tested: Setting) -> Table:
    """The recommended setting's results on test rows: every measure, and its difference from the base."""
    means, record = tested.record.means(), tested.record
    base, steered = means[BASE], means[label(tested.strength)]
    seen = record.seen(), record.seen(tested.strength)
    table = comparison({"base": base, "recommended": steered}, "test")
    differences = [_difference(name, *seen) for name in measured([base, steered])]
    return Table(table.frame.assign(**{"difference, 95 %": differences}), table.name)


def _difference(name: str, base: Seen, steered: Seen) -> str:
    """The mean difference with its interval, if every row has a value and the same weight."""
    measure = measures.get(name)
    if measure.weight or measure.total is not None:
        return ""
    differences = measure.rows(steered) - measure.rows(base)
    return str(interval(differences)) if np.isfinite(differences).all() else ""


def _maps(result: Sweep) -> Section | None:
    settings, choice = result.settings, result.choice
    if not settings:
        return None
    name, base = deciding(settings), settings[0].base
    label = "behaviour" if name == "behaviour" else "pair accuracy"
    panels: dict[str, tuple[plots.Value, str]] = {
        label: (lambda setting: setting.value(name), "viridis"),
        "margin gain, nats": (lambda setting: setting.value("margin_gain"), "viridis"),
        "moved wrong": (lambda setting: setting.value("moved_wrong"), "magma_r"),
        "log10 KL": (lambda setting: float(np.log10(max(setting.value("kl"), 1e-6))), "magma_r"),
        "log10 perplexity / base": (
            lambda setting: float(np.log10(setting.value("perplexity") / base.value("perplexity"))),
            "magma_r",
        ),
    }
    if any(np.isfinite(setting.value("neutral_repetition")) for setting in settings):
        panels["repetition"] = (lambda setting: setting.value("neutral_repetition"), "magma_r")
    value, limit = panels[label][0], result.table.limits.kl
    front = plots.pareto(settings, value, base.value(name), limit, choice, label)
    text = (
        f"Validation rows; the base model has a {label} of {base.value(name):.3f}. The recommended setting is framed."
    )
    blocks = [
        Text(text),
        Figure(plots.heat_maps(settings, panels, choice), "heat", "heat maps of layers and strengths"),
        Figure(front, "pareto", f"{label} against KL"),
    ]
    return Section("Layers × strengths", blocks)


def _side_effects(result: Sweep) -> Section | None:
    """The effect of every strength at the place of `result.shown`."""
    if result.shown is None:
        return None
    where = place(result.shown).partition(" at ")[0]
    return Section(f"Every strength at {where} (validation rows)", of_strengths(result.shown.record))


def _evenness(result: Sweep) -> Section | None:
    """How much the effect of `result.shown` varies among examples."""
    choice, shown = result.choice, result.shown
    if shown is None:
        return None
    parts = {"validation": reliability(shown)}
    if choice.setting is not None:
        parts["test"] = reliability(result.tested)
    one = parts["validation"]
    text = (
        f"Slope of the margin against the strength, from the base model up to {place(shown)}: mean "
        f"{np.mean(one.slopes):+.2f} nats a unit of strength, from {min(one.slopes):+.2f} to {max(one.slopes):+.2f}."
    )
    warned = [Text(warning(one))] if choice.setting is None and one.unreliable else []
    figure = Figure(plots.slopes(parts), "slopes", "slopes of the examples")
    return Section("Example by example", [Text(text), *warned, figure])


def _table(result: Sweep) -> Section:
    """Every measure of every setting, the base model first."""
    names = measured([row for record in result.records for row in record.means().values()])
    rows = []

    def add(where: str, strength: float, record: Record, excess: str) -> None:
        rows.append([where, f"{strength:g}", *(_cell(name, record, strength) for name in names), excess])

    add("base", 0.0, result.records[0], "")
    for record in result.records:
        where = f"{record.facts['layer']}" + ("" if (site := record.facts["site"]) == "block" else f" ({site})")
        for strength in result.table.strengths:
            if record.facts["status"] == "ok":
                setting = Setting(record, strength)
                add(where, strength, record, ", ".join(excesses(setting, result.table.limits)))
            else:
                rows.append([where, f"{strength:g}", *[""] * len(names), record.facts["error"]])
    table = table_of(["layer", "strength", *map(title, names), "too much"], rows, "settings")
    return Section("Every setting (validation rows)", [table])


def _cell(name: str, record: Record, strength: float) -> str:
    """A measure at a strength; the measures that the choice compares have an interval."""
    mean = of_measure(measures.get(name), record.seen(strength))
    if mean is None:
        return ""
    return with_ends(mean) if name in BESIDE else number(mean.estimate)


def _answers(result: Sweep) -> Section | None:
    """The answers of the base model and the recommended setting to test prompts, or to neutral ones."""
    if result.test is None or not result.table.generations:
        return None
    base, steered = result.test.seen(), result.tested.record.seen(result.tested.strength)
    name, prompts = ("answer", result.prompts) if result.prompts else ("neutral_answer", result.neutral_prompts)
    heading = "Generated answers (test rows, greedy)" if result.prompts else "Neutral answers (greedy)"
    return Section(heading, generations(prompts, {"base": [*base[name]], "recommended": [*steered[name]]}))


def _use(setting: Setting) -> list[Block]:
    text = (
        f"`adapter/` in this folder is this vector with its strength {setting.strength:g} baked in: it is loaded as "
        "any adapter, and strength 1 is what was measured here."
    )
    lines = (
        "import steertune.adapters  # makes the method known to PEFT",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base, "adapter")',
    )
    return [Text(text), Code("\n".join(lines), "python")]


def _how(result: Sweep) -> Section:
    table = result.table
    one = "as long as the mean difference of the two answers there" if table.arm is None else "as trained"
    split = f" {prose(result.split)}" if result.split else ""
    scorer = f" Behaviour in generation: {escape(result.scorer)}." if result.scorer else ""
    text = (
        f"{table.train} training pairs, {table.splits.validation} validation and {table.splits.test} test pairs of "
        f"`{Path(table.task).name}`.{split} Base `{table.model.name}`. Strength 1 is {one}. Settings are chosen on "
        f"validation rows and on half of the neutral text. Differences have 95 % intervals over these rows.{scorer}"
    )
    time = f"{len(result.records) * len(table.strengths)} settings in {result.seconds / 60:.0f} minutes."
    blocks = [
        Text(text),
        *map(Text, result.notes),
        Text(time),
        Code(result.command, "bash"),
        Text(escape(result.versions)),
    ]
    return Section("How it was measured", blocks)
