"""Puts known bugs back, one at a time, and shows which tests fail for each: `python tests/project/fault_seeding.py`.

Every selection of tests runs twice, as it is and with the bug in it; noticed is a bug under which a test fails that
passes without it. Each run is a process of its own, forked after the heavy imports. What is known is kept in
`--state`, so a second start goes on; the table is written to `fault_seeding.md` and the exit status is 1 if a bug
went unnoticed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = HERE.parent
for key, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(key, value)
sys.path.insert(0, str(TESTS / "helpers"))

import pytest  # noqa: E402
from faults import FAULTS, Fault, seed  # noqa: E402
from tqdm import tqdm  # noqa: E402

COMMAND = "python tests/project/fault_seeding.py"


class Outcomes:
    """A pytest plug-in that notes what became of each test."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up, call and tear-down of every test."""
        if report.failed or report.when == "call":
            self.of[report.nodeid] = "failed" if report.failed else report.outcome


def _run(tests: str, which: str, fault: Fault | None, pipe: Any) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if fault is not None:
        seed(fault)
    outcomes = Outcomes()
    options = ["-n", "0", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", which]
    code = pytest.main([str(TESTS / f"{tests}.py"), *options], plugins=[outcomes])
    pipe.send(outcomes.of or {"": f"pytest exit status {int(code)}"})


def outcomes(tests: str, which: str, fault: Fault | None = None) -> dict[str, str]:
    """What becomes of the selected tests, in a process of their own."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_run, args=(tests, which, fault, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"": "crashed"}
    finally:
        process.join()


def judge(fault: Fault, clean: dict[str, str]) -> tuple[int, int]:
    """How many tests notice, of how many.

    Raises:
        RuntimeError: the tests do not pass without the fault, or it keeps them from running at all.
    """
    passing = {test for test, outcome in clean.items() if outcome == "passed"}
    if not passing or "failed" in clean.values():
        raise RuntimeError(f"{fault.tests} -k {fault.which!r} is no judge, without a fault it gives {clean}.")
    broken = outcomes(fault.tests, fault.which, fault)
    if "" in broken:
        raise RuntimeError(f"With {fault.name!r} nothing runs ({broken['']}): that is another fault.")
    return sum(broken.get(test) == "failed" for test in passing), len(passing)


def table(found: dict[str, list[int]]) -> str:
    """Markdown."""
    lines = [
        f"Each bug was put back and the tests named beside it were run (`{COMMAND}`).",
        "Without the bug all of them pass; *noticed by* counts those that fail with it.",
        "",
        "| bug | class | tests | noticed by |",
        "|---|---|---|---|",
    ]
    for fault in FAULTS:
        noticed, of = found.get(fault.name, ("not run", "?"))
        lines.append(f'| {fault.name} | {fault.kind} | `{fault.tests}.py -k "{fault.which}"` | {noticed} of {of} |')
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is not known yet; write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=Path(".fault_seeding.json"), help="what is known already")
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    options = parser.parse_args()
    import datasets, peft, sklearn, statsmodels.api, transformers, trl  # noqa: F401, E401, I001 (the forks share them)
    from transformers import Trainer  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    known = json.loads(options.state.read_text()) if options.state.is_file() else {}
    clean: dict[tuple[str, str], dict[str, str]] = {}
    for fault in tqdm([f for f in FAULTS if options.only in f.name], desc="Faults"):
        # what was found holds for this fault, not for another of its name
        key = f"{fault}"
        if key in known:
            continue
        selection = fault.tests, fault.which
        try:
            if selection not in clean:
                clean[selection] = outcomes(*selection)
            known[key] = judge(fault, clean[selection])
        except RuntimeError as error:
            tqdm.write(str(error))
            continue
        if not known[key][0]:
            tqdm.write(f"Not noticed: {fault.name}")
        unfinished = options.state.with_suffix(".part")
        unfinished.write_text(json.dumps(known))
        unfinished.replace(options.state)
    found = {fault.name: known[f"{fault}"] for fault in FAULTS if f"{fault}" in known}
    (HERE / "fault_seeding.md").write_text(table(found))
    return int(any(not found.get(fault.name, [0])[0] for fault in FAULTS if options.only in fault.name))


if __name__ == "__main__":
    sys.exit(main())
