"""The page a sweep ends with, made from its result alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steertune.recipes.ablation.statistics.paired import interval
from steertune.recipes.lab.files import write_whole
from steertune.recipes.lab.page import html_page, one_line
from steertune.recipes.lab.scorers import plain
from steertune.recipes.sweeping import plots
from steertune.recipes.sweeping.choose import (
    UNRELIABLE,
    Cell,
    Choice,
    Reliability,
    choose,
    excesses,
    place,
    reliability,
    right,
    scores,
)
from steertune.recipes.sweeping.settings import SweepTable


def write_page(folder: Path, result: dict[str, Any]) -> Path:
    """Write `page.md`, `page.html` and `charts/` from a sweep's result; return the Markdown page."""
    table = SweepTable(**result["settings"])
    base, cells = result["base"]["validation"], [c for c in result["cells"] if c["status"] == "ok"]
    choice = choose(cells, base, table.limits)
    charts = folder / "charts"
    charts.mkdir(exist_ok=True)
    named = f"{Path(table.task).name}: {table.what.replace('`', '')}, layers × strengths"
    lines = [f"# {named}", "", *_recommended(result, table, cells, choice)]
    lines += _maps(charts, table, base, cells, choice)
    lines += _even(charts, result, base, cells, choice)
    lines += _table(table, base, result["cells"])
    lines += _answers(result, choice)
    lines += _how(result, table)
    text = "\n".join(lines) + "\n"
    page = folder / "page.md"
    write_whole(page, text)
    write_whole(folder / "page.html", html_page(text, folder, named))
    return page


def warning(found: Reliability) -> str:
    """What is said of a setting that moves many examples the wrong way."""
    return (
        f"**Unreliable.** {found.wrong} of {len(found.slopes)} held-out examples ({found.share:.0%}, 95 % interval "
        f"{found.low:.0%} to {found.high:.0%}) move the wrong way; from {UNRELIABLE:.0%} on, the mean effect says "
        "little about the next example. More or cleaner pairs, another layer or another direction may help."
    )


def _recommended(result: dict[str, Any], table: SweepTable, cells: list[Cell], choice: Choice) -> list[str]:
    if choice.cell is None:
        return ["## Recommended: leave the model as it is", "", choice.reason, ""]
    found = reliability(choice.cell, cells, result["base"]["validation"])
    warned = [warning(found), ""] if found.unreliable else []
    rows = len(result["test"]["margins"])
    read_once = f"On {rows} test pairs and on the other half of the neutral text, read once:"
    lines = [f"## Recommended: {place(choice.cell)}", "", choice.reason, "", *warned, read_once, ""]
    return [*lines, *on_test(result), "", *result["use"], ""]


def on_test(result: dict[str, Any]) -> list[str]:
    """The table of what the recommended setting did on test rows."""
    before, after = result["base"]["test"], result["test"]
    correct = right(after) - right(before)
    gain = np.subtract(after["margins"], before["margins"])
    lines = [
        "| | base | recommended | difference, 95 % |",
        "|---|---|---|---|",
        f"| pair accuracy | {before['accuracy']:.3f} | {after['accuracy']:.3f} | {interval(correct)} |",
        f"| margin, nats | {before['margin']:.2f} | {after['margin']:.2f} | {interval(gain)} |",
    ]
    if scores(before) is not None and scores(after) is not None:
        difference = interval(np.subtract(after["behaviours"], before["behaviours"]))
        count = len(after["behaviours"])
        lines += [
            f"| behaviour of {count} generated answers | {before['behaviour']:.3f} | {after['behaviour']:.3f} | "
            f"{difference} |"
        ]
    lines += [
        f"| pairs moved the wrong way | | {int((gain < 0).sum())} of {len(gain)} | |",
        f"| KL to the base, nats a token | 0 | {after['kl']:.3f} | |",
        f"| perplexity of neutral answers | {before['perplexity']:.2f} | {after['perplexity']:.2f} | |",
    ]
    if "repetition" in after:
        lines += [f"| repeated word triples | {before['repetition']:.0%} | {after['repetition']:.0%} | |"]
    return lines


def _maps(charts: Path, table: SweepTable, base: Cell, cells: list[Cell], choice: Choice) -> list[str]:
    if not cells:
        return []
    scored = all(scores(cell) is not None for cell in (base, *cells))
    name = "behaviour" if scored else "accuracy"
    label = "behaviour" if scored else "pair accuracy"
    panels: dict[str, tuple[plots.Value, str]] = {
        label: (lambda c: c[name], "viridis"),
        "margin gain, nats": (lambda c: c["margin_gain"], "viridis"),
        "moved wrong": (lambda c: c["moved_wrong"], "magma_r"),
        "log10 KL": (lambda c: float(np.log10(max(c["kl"], 1e-6))), "magma_r"),
        "log10 perplexity / base": (lambda c: float(np.log10(c["perplexity"] / base["perplexity"])), "magma_r"),
    }
    if "repetition" in base:
        panels["repetition"] = (lambda c: c["repetition"], "magma_r")
    plots.heat_maps(cells, panels, choice, charts / "heat.png")
    value: plots.Value = lambda c: c[name]  # noqa: E731
    plots.pareto(cells, value, base[name], table.limits.kl, choice, charts / "pareto.png", label)
    return [
        "## Layers × strengths",
        "",
        f"Validation rows; the base model has a {label} of {base[name]:.3f}. The recommended setting is framed.",
        "",
        "![heat maps of layers and strengths](charts/heat.png)",
        "",
        f"![{label} against KL](charts/pareto.png)",
        "",
    ]


def _even(charts: Path, result: dict[str, Any], base: Cell, cells: list[Cell], choice: Choice) -> list[str]:
    """How evenly the recommended setting works, or without one the setting with the largest mean effect."""
    shown = choice.cell or max(cells, key=lambda c: c["margin_gain"], default=None)
    if shown is None:
        return []
    found = {"validation": reliability(shown, cells, base)}
    if choice.cell is not None:
        found["test"] = reliability(result["test"], [result["test"]], result["base"]["test"])
    plots.slopes(found, charts / "slopes.png")
    one = found["validation"]
    said = [] if choice.cell is not None or not one.unreliable else [warning(one), ""]
    return [
        "## Example by example",
        "",
        f"Slope of the margin against the strength, from the base model up to {place(shown)}: mean "
        f"{np.mean(one.slopes):+.2f} nats a unit of strength, from {min(one.slopes):+.2f} to {max(one.slopes):+.2f}.",
        "",
        *said,
        "![slopes of the examples](charts/slopes.png)",
        "",
    ]


def _table(table: SweepTable, base: Cell, cells: list[Cell]) -> list[str]:
    scored, repeats = "behaviour" in base, "repetition" in base
    head = ["layer", "strength", "pair accuracy", "margin gain", "moved wrong", "KL", "perplexity"]
    head += (["repetition"] if repeats else []) + (["behaviour"] if scored else []) + ["too much"]
    lines = ["## Every setting (validation rows)", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell in [{"site": "block", "layer": "base", "strength": 0.0, "status": "ok", **base}, *cells]:
        where = f"{cell['layer']}" + ("" if cell["site"] == "block" else f" ({cell['site']})")
        if cell["status"] != "ok":
            lines.append(f"| {where} | {cell['strength']:g} | {cell['error']} |" + " |" * (len(head) - 3))
            continue
        values = [where, f"{cell['strength']:g}", f"{cell['accuracy']:.3f}", f"{cell['margin_gain']:+.2f}"]
        values += [f"{cell['moved_wrong']:.0%}", f"{cell['kl']:.3f}", f"{cell['perplexity']:.2f}"]
        values += [f"{cell['repetition']:.0%}"] if repeats else []
        values += (["-" if cell["behaviour"] is None else f"{cell['behaviour']:.3f}"]) if scored else []
        lines.append("| " + " | ".join([*values, ", ".join(excesses(cell, base, table.limits))]) + " |")
    return [*lines, ""]


def _answers(result: dict[str, Any], choice: Choice) -> list[str]:
    if choice.cell is None or not result["base"]["test"].get("answers", result["base"]["test"].get("neutral_answers")):
        return []
    name = "answers" if "answers" in result["test"] else "neutral_answers"
    before, after = result["base"]["test"][name], result["test"][name]
    lines = ["## Generated answers (test rows, greedy)" if name == "answers" else "## Neutral answers (greedy)", ""]
    for prompt, base, steered in zip(result["prompts"][name], before, after, strict=False):
        lines += [f"**{one_line(plain(prompt))}**", ""]
        lines += [f"- base: {one_line(base)}", f"- recommended: {one_line(steered)}", ""]
    return lines


def _how(result: dict[str, Any], table: SweepTable) -> list[str]:
    one = "as long as the mean difference of the two answers there" if table.arm is None else "as trained"
    return [
        "## How it was measured",
        "",
        f"{table.train} training pairs, {table.splits.validation} validation and {table.splits.test} test pairs of "
        f"`{Path(table.task).name}`; base `{table.model.name}`. Strength 1 is {one}. Settings are chosen on "
        "validation rows and on half of the neutral text. Differences have 95 % intervals over these rows.",
        *([f"Behaviour in generation: {result['scorer']}."] if result["scorer"] else []),
        "",
        f"{len(result['cells'])} settings in {result['seconds'] / 60:.0f} minutes.",
        "",
        "```bash",
        result["command"],
        "```",
        "",
        result["versions"],
    ]
