"""Pages: the results of a training, a sweep or a study, as Markdown and as one HTML file.

A page has sections, and a section has blocks: text, tables, figures, code.

    page = Page("warm_tone", [Section("Cost", [Text("It took 3 s."), Table(frame, "cost")])])
    write_page(page, folder, "report")

writes `report.md` and `report.html` from the templates of this folder, `charts/NAME.png` and `.svg` for every
figure and `tables/NAME.tex` and `.md` for every table that has a name. The HTML file opens without a network and runs
no script.

Texts that the project did not write (an answer, an error, a name in another person's grid) are data. Cells of tables,
titles and code are escaped here; inside a `Text`, pass them through `escape`, or through `prose` where they may be
Markdown.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing

from steertune.recipes.lab.files import write_whole

CHARTS, TABLES = "charts", "tables"
_DPI = 160
_LATEX = {"−": "$-$", "η²": r"$\eta^2$", "²": "$^2$", "×": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
_LATEX |= {"<": "$<$", ">": "$>$"}


@dataclass(frozen=True)
class Text:
    """A paragraph or a list, in Markdown. Pictures in it are not shown: they would be fetched from the network."""

    kind: ClassVar[str] = "text"
    markdown: str


@dataclass(frozen=True)
class Code:
    """Code to copy."""

    kind: ClassVar[str] = "code"
    text: str
    language: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        frame: Its content; the index is not shown.
        name: Name of separate files with the table, for a paper or another page; "" for none.
    """

    kind: ClassVar[str] = "table"
    frame: pd.DataFrame
    name: str = ""

    @property
    def header(self) -> list[str]:
        """The column headings."""
        return [str(column) for column in self.frame.columns]

    @property
    def rows(self) -> list[list[str]]:
        """The cells as text; missing values are empty."""
        return [["" if pd.isna(cell) else str(cell) for cell in row] for row in self.frame.to_numpy(dtype=object)]


def table_of(header: Sequence[str], rows: Iterable[Sequence[Any]], name: str = "") -> Table:
    """A table from its header and its rows."""
    return Table(pd.DataFrame([[*row] for row in rows], columns=pd.Index(header)), name)


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        drawing: The matplotlib figure.
        name: Name of its files.
        alt: Alternative text.
    """

    kind: ClassVar[str] = "figure"
    drawing: Drawing
    name: str
    alt: str


Block: TypeAlias = Text | Code | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it; without a title it continues the previous section."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str
    sections: Sequence[Section]

    def blocks(self) -> Iterator[Block]:
        """All blocks, in their order."""
        for section in self.sections:
            yield from section.blocks


def write_page(page: Page, folder: Path, name: str = "page") -> Path:
    """Write a page with its figures and tables; return the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    for block in page.blocks():
        if isinstance(block, Figure):
            _save(block, folder / CHARTS)
        elif isinstance(block, Table) and block.name:
            (folder / TABLES).mkdir(exist_ok=True)
            write_whole(folder / TABLES / f"{block.name}.tex", latex(block))
            write_whole(folder / TABLES / f"{block.name}.md", table_markdown(block))
    file = folder / f"{name}.md"
    write_whole(file, markdown(page))
    write_whole(folder / f"{name}.html", html(page, folder))
    return file


def in_terminal(file: Path) -> str:
    """What a terminal shows of a written page: the outcome before its first heading, and how to use the result."""
    outcome, *sections = file.read_text(encoding="utf-8").split("\n## ")
    return "\n## ".join([outcome, *(section for section in sections if section.startswith("Use it"))])


def markdown(page: Page) -> str:
    """A page as Markdown."""
    return _templates().get_template("page.md.jinja").render(page=page)


def table_markdown(table: Table) -> str:
    """A table as Markdown."""
    return _templates().get_template("table.md.jinja").render(table=table)


def html(page: Page, folder: Path) -> str:
    """A page as HTML, with the figures that `write_page` wrote to the folder."""
    pictures = {}
    for figure in (block for block in page.blocks() if isinstance(block, Figure)):
        png = (folder / CHARTS / f"{figure.name}.png").read_bytes()
        pictures[figure.name] = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return _templates().get_template("page.html.jinja").render(page=page, pictures=pictures)


def latex(table: Table) -> str:
    """A table as LaTeX, for `\\input` in a paper that uses booktabs."""
    frame = pd.DataFrame(table.rows, columns=table.frame.columns)
    text = frame.to_latex(index=False, escape=True)
    for character, command in _LATEX.items():
        text = text.replace(character, command)
    return text


def escape(text: str) -> str:
    """Escape data for use inside Markdown: on one line, without markup."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]|#~>]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def prose(text: str) -> str:
    """A user's Markdown on one line: it can emphasise and quote, but any HTML is escaped."""
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", " ".join(text.split()))


def settings_in_words(table: Mapping[str, Any]) -> str:
    """A table of settings, such as an arm's `[adapter]`, for a sentence: "lora (r 8, lora_alpha 16)"."""
    values = {key: value for key, value in table.items() if key not in ("type", "name")}
    kind = str(table.get("type", table.get("name", "")))
    listed = ", ".join(f"{key} {_value_in_words(value)}" for key, value in values.items())
    return escape(f"{kind} ({listed})" if kind and listed else kind or listed)


def _value_in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key} {_value_in_words(inner)}' for key, inner in value.items())})"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _cell(text: str) -> str:
    """A table cell in Markdown: on one line, with everything escaped that could end the cell, make a link or be
    HTML."""
    return re.sub(r"[\\|`*]|!(?=\[)|(?<=\])(?=\()", r"\\\g<0>", prose(text))


def _save(figure: Figure, folder: Path) -> None:
    """Save a figure as PNG and SVG, whose bytes depend only on what they show."""
    folder.mkdir(exist_ok=True)
    with rc_context({"svg.hashsalt": "steertune"}):
        figure.drawing.savefig(folder / f"{figure.name}.png", dpi=_DPI)
        figure.drawing.savefig(folder / f"{figure.name}.svg", metadata={"Date": None})


@cache
def _templates() -> Environment:
    """The templates of this folder; HTML templates escape everything."""
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(
        loader=folder,
        autoescape=lambda name: name is not None and ".html." in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    parser = MarkdownIt("commonmark", {"html": False}).disable(["image", "html_block", "html_inline"])
    templates.filters |= {
        "escape_markdown": escape,
        "cell": _cell,
        "rendered": lambda text: Markup(parser.render(text)),
    }
    return templates
