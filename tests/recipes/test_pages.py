"""Pages: the same content as Markdown and as one HTML file, in which data are data."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure as Drawing

from steertune.recipes.lab.pages import Code, Figure, Page, Section, Table, Text, escape, latex, prose, write_page

EVIL = "<script>alert(1)</script> | ![x](http://nowhere.invalid/x.png) [y](http://nowhere.invalid)\n# not a heading"


def drawing() -> Drawing:
    figure = Drawing(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    return figure


def written(folder: Path, *blocks: Text | Code | Table | Figure, title: str = "a page") -> tuple[str, str]:
    page = write_page(Page(title, [Section("a section", blocks)]), folder)
    return page.read_text(encoding="utf-8"), page.with_suffix(".html").read_text(encoding="utf-8")


def test_a_page_has_its_blocks_in_both_formats(tmp_path):
    frame = pd.DataFrame({"arm": ["LoRA", "vector"], "mean": ["0.5", None]})
    markdown, html = written(
        tmp_path,
        Text("some *words*"),
        Table(frame, "means"),
        Figure(drawing(), "line", "a line"),
        Code("run()", "python"),
    )
    assert markdown == (
        "# a page\n\n## a section\n\nsome *words*\n\n| arm | mean |\n|---|---|\n| LoRA | 0.5 |\n| vector |  |\n\n"
        "![a line](charts/line.png)\n\n```python\nrun()\n```\n"
    )
    for part in ("<h2>a section</h2>", "<em>words</em>", "<th>mean</th>", 'alt="a line"', "<code>run()</code>"):
        assert part in html
    files = {file.name for file in tmp_path.rglob("*.*")}
    assert files == {"page.md", "page.html", "line.png", "line.svg", "means.md", "means.tex"}
    assert (tmp_path / "tables" / "means.md").read_text(encoding="utf-8") in markdown


def test_html_loads_nothing_and_runs_nothing(tmp_path):
    frame = pd.DataFrame({EVIL: [EVIL]})
    _, html = written(tmp_path, Text(EVIL), Text(escape(EVIL)), Table(frame), Code(EVIL), title=EVIL)
    assert "<script" not in html and "<img" not in html
    assert not re.findall(r"""src=["'](?!data:)""", html)


@pytest.mark.parametrize("text", [EVIL, "`code`", "*a* _b_ #1 ~x~", "a & b < c"])
def test_escaped_data_are_text(text, tmp_path):
    _, html = written(tmp_path, Text(escape(text)))
    body = html[html.index("</h2>") :]
    assert not re.findall(r"<(?:a|em|code|h1|img|del)\b", body) and len(re.findall("<p>", body)) == 1


def test_a_cell_cannot_end_its_row_or_be_html(tmp_path):
    markdown, _ = written(tmp_path, Table(pd.DataFrame({"answer": [EVIL]})))
    [row] = [line for line in markdown.splitlines() if "alert" in line]
    assert row.count("|") - row.count("\\|") == 2 and "<script" not in row and not re.search(r"(?<!\\)!\[|\]\(", row)


def test_prose_may_be_markdown_and_not_html():
    assert prose("a *b*\n`c`  <img src=x> 1 < 2") == "a *b* `c` &lt;img src=x> 1 < 2"


def test_latex_is_what_a_paper_can_input():
    table = Table(pd.DataFrame({"level − reference": ["low_rank"], "95 %": ["< 0.1"], "η²": ["0.5"]}))
    assert latex(table).splitlines()[2:5] == [
        "level $-$ reference & 95 \\% & $\\eta^2$ \\\\", "\\midrule", "low\\_rank & $<$ 0.1 & 0.5 \\\\",
    ]  # fmt: skip
