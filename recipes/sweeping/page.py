"""What a sweep found, and the page that is made of it alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from steertune.recipes.ablation.statistics.paired import interval
from steertune.recipes.lab import measures
from steertune.recipes.lab.files import write_whole
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.page import comparison, generations, html_page, measured, number, title
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
    """What a sweep found.

    Attributes:
        table: What was asked for.
        records: One for every place, measured on validation rows.
        command: That ran it.
        scorer: How the behaviour was scored; None: it was not.
        versions: Of the packages.
        test: The recommended setting on test rows; None: no setting is recommended.
        prompts: Test prompts that were answered, as plain text, and
        neutral_prompts: neutral ones.
        seconds: How long it took.
    """

    table: SweepTable
    records: list[Record]
    command: str
    scorer: str | None
    versions: str
    test: Record | None = None
    prompts: tuple[str, ...] = ()
    neutral_prompts: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def settings(self) -> list[Setting]:
        """The settings that did not diverge."""
        return settings_of(self.records)

    @cached_property
    def choice(self) -> Choice:
        """The recommendation."""
        return choose(self.settings, self.table.limits)

    @property
    def tested(self) -> Setting:
        """The recommended setting on test rows, where there is one."""
        assert self.test is not None and self.choice.setting is not None
        return Setting(self.test, self.choice.setting.strength)

    def to_json(self) -> dict[str, Any]:
        """What `result.json` holds."""
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
            "seconds": self.seconds,
        }


def write_page(folder: Path, result: Sweep) -> Path:
    """Write `page.md`, `page.html` and `charts/`; return the Markdown page."""
    table = result.table
    charts = folder / "charts"
    charts.mkdir(exist_ok=True)
    named = f"{Path(table.task).name}: {table.what.replace('`', '')}, layers × strengths"
    lines = [f"# {named}", "", *_recommended(result), *_maps(charts, result), *_evenness(charts, result)]
    lines += [*_table(result), *_answers(result), *_how(result)]
    text = "\n".join(lines) + "\n"
    page = folder / "page.md"
    write_whole(page, text)
    write_whole(folder / "page.html", html_page(text, folder, named))
    return page


def warning(slopes: Reliability) -> str:
    """What is said of a setting that moves many examples the wrong way."""
    return (
        f"**Unreliable.** {slopes.wrong} of {len(slopes.slopes)} held-out examples ({slopes.share:.0%}, 95 % interval "
        f"{slopes.low:.0%} to {slopes.high:.0%}) move the wrong way; from {UNRELIABLE:.0%} on, the mean effect says "
        "little about the next example. More or cleaner pairs, another layer or another direction may help."
    )


def _recommended(result: Sweep) -> list[str]:
    choice = result.choice
    if choice.setting is None:
        return ["## Recommended: leave the model as it is", "", choice.reason, ""]
    slopes, tested = reliability(choice.setting), result.tested
    warned = [warning(slopes), ""] if slopes.unreliable else []
    read_once = f"On {len(tested.rows('margin'))} test pairs and on the other half of the neutral text, read once:"
    lines = [f"## Recommended: {place(choice.setting)}", "", choice.reason, "", *warned, read_once, ""]
    return [*lines, *on_test(tested), "", *_use(choice.setting), ""]


def on_test(tested: Setting) -> list[str]:
    """The table of what the recommended setting did on test rows: every measure, and its difference from the base."""
    means, record = tested.record.means(), tested.record
    base, steered = means[BASE], means[label(tested.strength)]
    head, rule, *rows = comparison({"base": base, "recommended": steered})
    lines = [f"{head} difference, 95 % |", f"{rule}---|"]
    for name, row in zip(measured([base, steered]), rows, strict=True):
        lines.append(f"{row} {_difference(name, record.seen(), record.seen(tested.strength))} |")
    return lines


def _difference(name: str, base: Seen, steered: Seen) -> str:
    """The mean difference with its interval, where every row has a value and all count the same."""
    measure = measures.get(name)
    if measure.weight or measure.total is not None:
        return ""
    differences = measure.rows(steered) - measure.rows(base)
    return str(interval(differences)) if np.isfinite(differences).all() else ""


def _maps(charts: Path, result: Sweep) -> list[str]:
    settings, choice = result.settings, result.choice
    if not settings:
        return []
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
    plots.heat_maps(settings, panels, choice, charts / "heat.png")
    value, limit = panels[label][0], result.table.limits.kl
    plots.pareto(settings, value, base.value(name), limit, choice, charts / "pareto.png", label)
    return [
        "## Layers × strengths",
        "",
        f"Validation rows; the base model has a {label} of {base.value(name):.3f}. The recommended setting is framed.",
        "",
        "![heat maps of layers and strengths](charts/heat.png)",
        "",
        f"![{label} against KL](charts/pareto.png)",
        "",
    ]


def _evenness(charts: Path, result: Sweep) -> list[str]:
    """How evenly the recommended setting works, or without one the setting with the largest mean effect."""
    choice = result.choice
    shown = choice.setting or max(result.settings, key=lambda one: one.value("margin_gain"), default=None)
    if shown is None:
        return []
    parts = {"validation": reliability(shown)}
    if choice.setting is not None:
        parts["test"] = reliability(result.tested)
    plots.slopes(parts, charts / "slopes.png")
    one = parts["validation"]
    warned = [] if choice.setting is not None or not one.unreliable else [warning(one), ""]
    return [
        "## Example by example",
        "",
        f"Slope of the margin against the strength, from the base model up to {place(shown)}: mean "
        f"{np.mean(one.slopes):+.2f} nats a unit of strength, from {min(one.slopes):+.2f} to {max(one.slopes):+.2f}.",
        "",
        *warned,
        "![slopes of the examples](charts/slopes.png)",
        "",
    ]


def _table(result: Sweep) -> list[str]:
    """Every measure of every setting, the base model first."""
    means = [record.means() for record in result.records]
    names = measured([row for of_place in means for row in of_place.values()])
    head = ["layer", "strength", *map(title, names), "too much"]
    lines = ["## Every setting (validation rows)", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def add(where: str, strength: float, values: dict[str, float], excess: str) -> None:
        numbers = [number(values[name]) if name in values else "" for name in names]
        lines.append("| " + " | ".join([where, f"{strength:g}", *numbers, excess]) + " |")

    add("base", 0.0, means[0][BASE], "")
    for record, of_place in zip(result.records, means, strict=True):
        where = f"{record.facts['layer']}" + ("" if (site := record.facts["site"]) == "block" else f" ({site})")
        for strength in result.table.strengths:
            if record.facts["status"] == "ok":
                setting = Setting(record, strength)
                add(where, strength, of_place[label(strength)], ", ".join(excesses(setting, result.table.limits)))
            else:
                add(where, strength, {}, record.facts["error"])
    return [*lines, ""]


def _answers(result: Sweep) -> list[str]:
    """What the base model and the recommended setting answer to test prompts, or to neutral ones."""
    if result.test is None or not result.table.generations:
        return []
    base, steered = result.test.seen(), result.tested.record.seen(result.tested.strength)
    name, prompts = ("answer", result.prompts) if result.prompts else ("neutral_answer", result.neutral_prompts)
    lines = generations(prompts, {"base": [*base[name]], "recommended": [*steered[name]]})
    heading = "## Generated answers (test rows, greedy)" if result.prompts else "## Neutral answers (greedy)"
    return [heading, *lines[1:]]


def _use(setting: Setting) -> list[str]:
    return [
        f"`adapter/` in this folder is this vector with its strength {setting.strength:g} baked in: it is loaded as "
        "any adapter, and strength 1 is what was measured here.",
        "",
        "```python",
        "import steertune.adapters  # makes the method known to PEFT",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base, "adapter")',
        "```",
    ]


def _how(result: Sweep) -> list[str]:
    table = result.table
    one = "as long as the mean difference of the two answers there" if table.arm is None else "as trained"
    return [
        "## How it was measured",
        "",
        f"{table.train} training pairs, {table.splits.validation} validation and {table.splits.test} test pairs of "
        f"`{Path(table.task).name}`; base `{table.model.name}`. Strength 1 is {one}. Settings are chosen on "
        "validation rows and on half of the neutral text. Differences have 95 % intervals over these rows.",
        *([f"Behaviour in generation: {result.scorer}."] if result.scorer else []),
        "",
        f"{len(result.records) * len(table.strengths)} settings in {result.seconds / 60:.0f} minutes.",
        "",
        "```bash",
        result.command,
        "```",
        "",
        result.versions,
    ]
