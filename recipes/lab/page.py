"""The page a run ends with: Markdown a person reads, and one plot; and any page as one HTML file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from steertune.recipes.lab import measures
from steertune.recipes.lab.files import write_whole
from steertune.recipes.lab.rows import BASE, Record


def number(value: float) -> str:
    """A mean on a page: three decimals, or two digits where that would be 0."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"


def title(name: str) -> str:
    """What a page calls a measure, with its unit."""
    found = measures.get(name)
    return f"{found.title}, {found.unit}" if found.unit else found.title


def measured(columns: Sequence[Mapping[str, float]]) -> list[str]:
    """Names of the measures that any of the columns has."""
    return [name for name in measures.names() if any(name in column for column in columns)]


def comparison(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table with a row for every measure.

    Args:
        columns: What a model is called -> its means, from `Record.means`.
    """
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in measured([*columns.values()]):
        values = (number(column[name]) if name in column else "" for column in columns.values())
        lines.append(f"| {title(name)} | " + " | ".join(values) + " |")
    return lines


def by_strength(means: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table with a row for every strength and a column for every measure.

    Args:
        means: From `Record.means`.
    """
    names, strengths = measured([*means.values()]), sorted(means, key=float)
    lines = ["| strength | " + " | ".join(map(title, names)) + " |", "|---" * (len(names) + 1) + "|"]
    for strength in strengths:
        values = (number(means[strength][name]) if name in means[strength] else "" for name in names)
        lines.append(f"| {strength} | " + " | ".join(values) + " |")
    return lines


def strength_plot(means: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Pair accuracy and margin against strength, as a PNG.

    Args:
        means: From `Record.means`.
        file: Where the picture goes.
    """
    from matplotlib.figure import Figure  # a figure of its own: no display, no global state

    figure = Figure(figsize=(7, 3), layout="constrained")
    strengths = sorted(means, key=float)
    for axis, name in zip(figure.subplots(1, 2), ("accuracy", "margin"), strict=True):
        axis.plot([float(strength) for strength in strengths], [means[s][name] for s in strengths], marker="o")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(xlabel="strength", ylabel=title(name))
    figure.savefig(file, dpi=120)


def write_page(folder: Path, record: Record, what: str, use: Sequence[str]) -> Path:
    """Write the `page.md` of a training, and its plot; return the page's path.

    Args:
        folder: Of the run.
        record: The base model at strength 0, the trained one at the others.
        what: What was trained on what, in a sentence.
        use: The lines of Python that load the adapter.
    """
    page, means, facts = folder / "page.md", record.means(), record.facts
    strengths = []
    if "accuracy" in means[BASE]:
        strength_plot(means, folder / "strengths.png")
        strengths = ["![pair accuracy and margin against strength](strengths.png)", ""]
    lines = [
        f"# {record.keys['arm']}",
        "",
        what,
        *(f"\n{note}" for note in facts["notes"].values()),
        "",
        *comparison({"before": means[BASE], "after": means["1"]}),
        "",
        "## Strength",
        "",
        *by_strength(means),
        "",
        *strengths,
        *generations(facts["prompts"], answers_of(record)),
        "## Cost",
        "",
        f"{facts['parameters']:,} trained parameters, {facts['train_seconds']:.0f} s of training "
        f"({facts['steps']} steps), {facts['seconds']:.0f} s in all, {facts['peak_memory_gb']:.2f} GB peak memory, "
        f"{facts['processes']} process(es).",
        "",
        "## Use it",
        "",
        "```python",
        *use,
        "```",
    ]
    write_whole(page, "\n".join(lines) + "\n")
    return page


def answers_of(record: Record) -> dict[str, list[str]]:
    """What the base model and the trained one at every strength answer."""
    names = {at: "base" if at == BASE else f"strength {at}" for at in record.observations}
    return {names[at]: seen["answer"] for at, seen in record.observations.items() if "answer" in seen}


def generations(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> list[str]:
    """Prompts with what several models answer.

    Args:
        prompts: As plain text.
        answers: What a model is called -> its answers.
    """
    if not prompts or not answers:
        return []
    lines = ["## Generations (greedy)", ""]
    for i, prompt in enumerate(prompts):
        lines += [f"**{one_line(prompt)}**", ""]
        lines += [f"- {name}: {one_line(texts[i])}" for name, texts in answers.items()] + [""]
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
