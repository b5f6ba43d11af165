"""The report of `.ci/upstream`: the versions, what failed, and the first line of each failure.

python .ci/upstream_report.py JUNIT_FILE LOG > report.md
"""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
_WIDTH = 160
_LAST = 12  # lines of the log, where no test ran


def report(junit: Path, log: Path, setup: str, versions: dict[str, str], command: str) -> str:
    """The page as Markdown.

    Args:
        junit: Pytest's results; missing if pytest did not run.
        log: The output of the installation and of pytest.
        setup: The text of `setup.py`.
        versions: Package -> installed version.
        command: The command, and the date.
    """
    lines = ["# On the newest transformers, TRL and PEFT", "", command, ""]
    lines += ["| package | ran on | `setup.py` asks for |", "|---|---|---|"]
    lines += [f"| {name} | {versions[name]} | `{requirement(name, setup)}` |" for name in PACKAGES]
    if not junit.is_file():
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST:] if log.is_file() else []
        return "\n".join([*lines, "", "No test ran. The last lines of the log:", "", "```text", *last, "```", ""])
    cases = [*ElementTree.parse(junit).iter("testcase")]
    failed = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    names = {id(case) for case, _ in failed}
    passed = len(cases) - len(names) - skipped
    lines += ["", f"{passed} tests passed, {len(names)} failed, {skipped} were skipped."]
    if failed:
        lines += ["", "| tests | file | first line of the failure |", "|---|---|---|"]
        # one cause fails many tests, so tests of a file with the same line share a row
        causes = Counter((case.get("classname", ""), first_line(child)) for case, child in failed)
        for (file, line), count in causes.most_common():
            lines.append(f"| {count} | `{file.replace('.', '/')}.py` | {line} |")
    return "\n".join([*lines, ""])


def requirement(name: str, setup: str) -> str:
    """The versions of a package that `setup.py` allows, such as `>=5.17,<5.24`; empty if it does not name it."""
    found = re.search(rf'"{name}([<>=!~][^"]*)"', setup)
    return found[1] if found else ""


def first_line(failure: ElementTree.Element) -> str:
    """The first line of an error, in one cell of a table."""
    text = (failure.get("message") or failure.text or "").strip()
    line = text.splitlines()[0] if text else "no message"
    return line[:_WIDTH].replace("|", "\\|")


def installed(name: str) -> str:
    """A package's version."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    setup_py = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    found_versions = {name: installed(name) for name in PACKAGES}
    called = f"`{' '.join(['.ci/upstream', *sys.argv[3:]])}` on {datetime.date.today()}:"
    sys.stdout.write(report(Path(sys.argv[1]), Path(sys.argv[2]), setup_py, found_versions, called))
