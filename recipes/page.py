"""The page a run ends with: Markdown a person reads, and one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def strength_plot(rows: Sequence[Mapping[str, float]], file: Path) -> None:
    """Pair accuracy and margin against strength, as a PNG."""
    from matplotlib.figure import Figure  # a figure of its own: no display, no global state

    figure = Figure(figsize=(7, 3), layout="constrained")
    strengths = [row["strength"] for row in rows]
    for axis, key, label in zip(
        figure.subplots(1, 2), ("pair_accuracy", "margin"), ("pair accuracy", "margin (nats)"), strict=True
    ):
        axis.plot(strengths, [row[key] for row in rows], marker="o")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(xlabel="strength", ylabel=label)
    figure.savefig(file, dpi=120)


def write_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write `page.md` from the results of a run (`result.json`); return its path."""
    page = folder / "page.md"
    page.write_text("\n".join(_lines(result)) + "\n", encoding="utf-8")
    return page


def _lines(result: Mapping[str, Any]) -> list[str]:
    effects, cost = result["side_effects"], result["cost"]
    return [
        f"# {result['name']}",
        "",
        f"{result['what']}",
        "",
        "| | before | after |",
        "|---|---|---|",
        *_preference(result),
        f"| perplexity on neutral answers | {effects['base_perplexity']:.2f} | {effects['perplexity']:.2f} |",
        f"| KL(trained ‖ base) on neutral answers, nats per token | 0 | {effects['kl']:.4f} |",
        "",
        *_strengths(result["strengths"]),
        *_generations(result["generations"]),
        "## Cost",
        "",
        f"{cost['trainable_parameters']:,} trained parameters, {cost['train_seconds']:.0f} s of training "
        f"({cost['steps']} steps), {cost['total_seconds']:.0f} s in all, {cost['peak_memory_gb']:.2f} GB peak memory, "
        f"{cost['processes']} process(es).",
        "",
        "## Use it",
        "",
        "```python",
        *result["use"],
        "```",
    ]


def _preference(result: Mapping[str, Any]) -> list[str]:
    by_strength = {row["strength"]: row for row in result["strengths"]}
    if not by_strength:
        return []
    before, after = by_strength[0.0], by_strength[1.0]
    return [
        f"| held-out pair accuracy ({result['test_examples']} pairs) | {before['pair_accuracy']:.3f} | "
        f"{after['pair_accuracy']:.3f} |",
        f"| held-out margin, nats | {before['margin']:.2f} | {after['margin']:.2f} |",
        f"| pairs moved the wrong way | | {after['moved_wrong']:.1%} |",
    ]


def _strengths(rows: Sequence[Mapping[str, float]]) -> list[str]:
    if not rows:
        return []
    return [
        "## Strength",
        "",
        "| strength | pair accuracy | margin, nats |",
        "|---|---|---|",
        *(f"| {r['strength']:g} | {r['pair_accuracy']:.3f} | {r['margin']:.2f} |" for r in rows),
        "",
        "![pair accuracy and margin against strength](strengths.png)",
        "",
    ]


def _generations(rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not rows:
        return []
    lines = ["## Generations (greedy)", ""]
    for row in rows:
        lines += [f"**{_one_line(row['prompt'])}**", ""]
        lines += [f"- at {name}: {_one_line(text)}" for name, text in row.items() if name != "prompt"] + [""]
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
