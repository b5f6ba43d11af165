"""The page a run ends with: Markdown a person reads, and one plot; and any page as one HTML file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt


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
        *preference(result),
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


def preference(result: Mapping[str, Any]) -> list[str]:
    """Rows of a table, before and after: accuracy and margin on held-out pairs, where there are pairs."""
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
        lines += [f"**{one_line(row['prompt'])}**", ""]
        lines += [f"- at {name}: {one_line(text)}" for name, text in row.items() if name != "prompt"] + [""]
    return lines


def one_line(text: str) -> str:
    """Text as it may stand in a list or a table."""
    return " ".join(text.split()).replace("|", "\\|")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .3em .7em; border-bottom: 1px solid #e5e5e5; text-align: left; }
td { white-space: nowrap; } td:last-child { white-space: normal; }
th { border-bottom: 2px solid #999; }
img { max-width: 100%; } code { background: #f5f5f5; padding: .1em .3em; }
pre code { display: block; padding: .8em; }
"""


def html_page(markdown: str, folder: Path, title: str) -> str:
    """The page in one file: pictures inside, no network, no script."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(charts/\w+\.png)"', inline, body)
    body = re.sub(r'<img src="(?!data:)[^>]*>', "", body)  # of a text that somebody wrote: it would ask the network
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"
