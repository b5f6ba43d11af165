"""What the page "What is tested" says: versions, families of models, and the report on the newest upstream."""

from __future__ import annotations

import re

from families import FAMILIES, TABLE, WAYS
from packaging.requirements import Requirement
from packaging.version import Version
from paths import ROOT, module_at
from tiny_models import ARCHITECTURES

lane = module_at(ROOT / ".ci" / "upstream_report.py")
sources = module_at(ROOT / "docs" / "sources.py")
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
VERSIONS = dict.fromkeys(lane.PACKAGES, "9.0")


def rows(markdown: str) -> dict[str, list[str]]:
    """First cell -> the others, without backticks."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {cells[0].strip("`"): [cell.strip("`") for cell in cells[1:]] for cells in lines}


def test_the_families_on_the_page_are_those_that_run():
    table = rows(sources.on_page_markdown("<!-- list: architectures -->"))
    assert {*table} - {"family"} == {*FAMILIES}
    for family in ARCHITECTURES:
        assert table[family][0] == "yes" and table[family][1] == f"{len(WAYS)} of {len(WAYS)}", family
    assert table["mamba"] == ["", f"7 of {len(WAYS)}", "transformers refuses it"]
    assert "refused by name" in table["gemma3n_text"][2] and TABLE.is_file()


def test_the_versions_on_the_page_are_those_of_setup_py():
    table = rows(sources.on_page_markdown("<!-- list: versions -->"))
    assert Requirement(f"peft{table['peft'][0]}").specifier.contains("0.21.2")
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        assert f'"{name}{table[name][0]}"' in SETUP


def test_the_committed_report_is_of_the_lane_and_of_versions_that_are_not_too_old():
    text = (ROOT / "docs" / "results" / "upstream" / "table.md").read_text(encoding="utf-8")
    table = rows(text)
    assert {*lane.PACKAGES} <= {*table} and re.search(r"^\d+ tests passed, \d+ failed", text, re.MULTILINE)
    for name in lane.PACKAGES:
        [lowest] = [one for one in Requirement(f"{name}{table[name][1]}").specifier if one.operator == ">="]
        assert Version(table[name][0]) >= Version(lowest.version), name


def test_the_lane_runs_files_that_exist():
    text = (ROOT / ".ci" / "upstream").read_text(encoding="utf-8")
    braces = re.findall(r"tests/(\w+)/test_\{([\w,]+)\}", text)
    named = [(folder, name) for folder, names in braces for name in names.split(",")]
    assert len(named) > 8
    for folder, name in named:
        assert (ROOT / "tests" / folder / f"test_{name}.py").is_file(), name


def test_the_report_counts_and_groups_failures(tmp_path):
    cases = {
        "adapters.test_peft": ["", *['<failure message="TypeError: x | y&#10;more"/>'] * 2],
        "trainers.test_parents": ['<error message="ImportError: z"/>', '<skipped message="no"/>'],
    }
    lines = [
        f'<testcase classname="tests.{file}" name="a">{child}</testcase>' for file in cases for child in cases[file]
    ]
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    page = lane.report(tmp_path / "junit.xml", tmp_path / "log", SETUP, VERSIONS, "called")
    assert "1 tests passed, 3 failed, 1 were skipped." in page
    assert "| 2 | `tests/adapters/test_peft.py` | TypeError: x \\| y |" in page
    assert "| 1 | `tests/trainers/test_parents.py` | ImportError: z |" in page


def test_an_installation_that_fails_is_a_report_too(tmp_path):
    (tmp_path / "log").write_text("\n".join(map(str, range(99))))
    page = lane.report(tmp_path / "junit.xml", tmp_path / "log", SETUP, VERSIONS, "called")
    assert "No test ran." in page and "\n98\n" in page and "\n50\n" not in page
