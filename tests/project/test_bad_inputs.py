"""Every public entry point, given what is wrong, says so: a named error with the value and the fix, soon, and never a
traceback from somewhere inside. The tables stand in `tests/helpers/bad_inputs_*.py`, by entry point;
`python tests/project/test_bad_inputs.py` runs them all and writes `bad_inputs.md`, what each was told."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))  # when it runs as a script

import bad_inputs_adapters
import bad_inputs_arguments
import bad_inputs_careless
import bad_inputs_commands
import bad_inputs_data
import bad_inputs_first_contact
import bad_inputs_grids
import pytest
from bad_inputs import Lab, make_lab

from steertune.trainers import NonFiniteError

TABLES = {
    "adapters": bad_inputs_adapters.ROWS,
    "arguments": bad_inputs_arguments.ROWS,
    "careless": bad_inputs_careless.ROWS,
    "commands": bad_inputs_commands.ROWS,
    "data": bad_inputs_data.ROWS,
    "first contact": bad_inputs_first_contact.ROWS,
    "grids": bad_inputs_grids.ROWS,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}
NAMED = (ValueError, TypeError, OSError, NonFiniteError, NotImplementedError)
FROM_INSIDE = (UnicodeError, json.JSONDecodeError)  # both are ValueErrors, and neither names the file
SECONDS = 5.0  # of this process, which on a busy machine are some times those on an idle one


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    """Good files and models, to be spoiled in copies."""
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("name", ROWS)
def test_it_is_a_named_error(name: str, lab: Lab, tmp_path, monkeypatch) -> None:
    call, says = ROWS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lab.here = tmp_path
    begun = time.process_time()
    with pytest.raises(NAMED, match=f"(?s){says}") as caught:
        call(lab)
    assert not isinstance(caught.value, FROM_INSIDE), repr(caught.value)
    assert time.process_time() - begun < SECONDS


def test_none_is_there_twice() -> None:
    assert len(ROWS) == sum(map(len, TABLES.values())) >= 500


def test_the_good_ones_are_good(lab: Lab, tmp_path) -> None:
    """What the tables spoil is accepted as it is, so that every error above is about what was spoiled."""
    lab.here = tmp_path
    goods: list[Any] = [
        bad_inputs_adapters.load(lab, lab.adapter()),
        bad_inputs_data.load(lab, "good.jsonl", bad_inputs_data.LINES),
        bad_inputs_grids.grid(lab, {}),
        bad_inputs_grids.report(lab),
    ]
    assert all(good is not None for good in goods)


@pytest.mark.parametrize("text", bad_inputs_data.WELCOME)
def test_byte_order_marks_and_line_ends_of_windows_are_welcome(text: str, lab: Lab, tmp_path) -> None:
    lab.here = tmp_path
    rows = bad_inputs_data.load(lab, text, bad_inputs_data.WELCOME[text])
    assert rows.to_list()[:1] == [bad_inputs_data.ROW]


def test_an_arm_from_windows_is_read(lab: Lab, tmp_path) -> None:
    from steertune.recipes.lab.arm import load_arm

    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xef\xbb\xbf" + b'[data]\r\nname = "cautious_advice"\r\n')
    assert load_arm(file).data.name == "cautious_advice"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything may be read here")
def test_a_file_that_may_not_be_read(lab: Lab, tmp_path) -> None:
    lab.here = tmp_path
    folder = lab.adapter()
    (folder / "adapter_model.safetensors").chmod(0)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        bad_inputs_adapters.load(lab, folder)


def told(name: str, lab: Lab, here: Path) -> str:
    """What an input is told, on one line, without what differs between machines."""
    lab.here = here
    try:
        ROWS[name][0](lab)
    except NAMED as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "ACCEPTED"
    for folder in (here, lab.root, Path(sys.prefix), Path(__file__).parents[2], Path.home()):
        text = text.replace(str(folder), "...")
    text = re.sub(r"/tmp/[\w./-]*|0x[0-9a-f]{6,}", "...", " ".join(text.split()))
    return text if len(text) <= 200 else f"{text[:197]}..."


def write_table(file: Path) -> None:
    """Run every row in a folder of its own, and write what each was told."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    lines = []
    with tempfile.TemporaryDirectory() as root:
        lab = make_lab(Path(root) / "lab")
        for table, rows in TABLES.items():
            lines += ["", f"## {table.capitalize()}: {len(rows)}", "", "| input | what it is told |", "|---|---|"]
            for number, name in enumerate(rows):
                here = Path(root) / f"{table}-{number}"
                here.mkdir()
                os.chdir(here)
                text = told(f"{table}: {name}", lab, here)
                lines.append(f"| {name} | {text.replace('|', chr(92) + '|').replace('`', chr(39))} |")
    head = f"# What {len(ROWS)} bad inputs are told\n\nWritten by `python tests/project/test_bad_inputs.py`."
    file.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(__file__).with_name("bad_inputs.md").absolute())
