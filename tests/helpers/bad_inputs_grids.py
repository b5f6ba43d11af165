"""Arms, grids, mixtures, and what a grid leaves behind: cells, tunings, `grid.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bad_inputs import Lab, Row

from steertune.recipes.ablate import GRID
from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.grid import find_tasks, load_grid, make_grid
from steertune.recipes.ablation.store import Store
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.contrast_prompts import Mixture
from steertune.recipes.contrast_prompts import read as read_mixture
from steertune.recipes.lab.arm import load_arm, make_arm
from steertune.recipes.lab.files import read_result, write_result
from steertune.recipes.lab.rows import FORMAT
from steertune.recipes.report import write_report

ARM = {"name": "mine", "data": {"name": "cautious_advice"}}


def grid(lab: Lab, changes: dict[str, Any]) -> Any:
    """The good grid with other tables; a key with dots changes one value of a table."""
    tables = lab.tables()
    for key, value in changes.items():
        *path, last = key.split("/")
        inner = tables
        for name in path:
            inner = inner.setdefault(name, {})
        if value is DROP:
            inner.pop(last)
        else:
            inner[last] = value
    return make_grid(tables)


def bad(says: str, changes: dict[str, Any]) -> Row:
    return (lambda lab: grid(lab, changes)), says


def arm(says: str, **tables: Any) -> Row:
    return (lambda lab: make_arm({**ARM, **tables})), says


def words(says: str, *overrides: str) -> Row:
    return (lambda lab: load_arm("vector_dpo", overrides)), says


def toml(says: str, content: bytes | None, read: Callable[[Any], Any] = load_arm) -> Row:
    def call(lab: Lab) -> Any:
        if content is None:
            (lab.here / "x.toml").mkdir()
        else:
            lab.file("x.toml", content)
        return read("x.toml")

    return call, says


def result(says: str, change: Callable[[bytes], bytes]) -> Row:
    """A result that was spoiled."""

    def call(lab: Lab) -> Any:
        write_result(lab.here / "x.json", {"version": 3, "seconds": 1.5, "text": "abc"})
        (lab.here / "x.json").write_bytes(change((lab.here / "x.json").read_bytes()))
        return read_result(lab.here / "x.json", "Delete it.")

    return call, says


CELL = {
    "format": FORMAT, "task": "task", "arm": "a", "examples": 4, "seed": 0,
    "facts": {"key": "k", "status": "ok", "scalable": True, "seconds": 1.0, "tuning_seconds": 0.5, "setting": None},
    "observations": {"0": {"margin": [1.0, -1.0]}, "tuned": {"margin": [1.0, 1.0]}},
}  # fmt: skip
OLD_CELL = {"version": 3, "task": "task", "arm": "a", "examples": 4, "seed": 0, "status": "ok", "key": "k"}
PATH = "cells/task/n4/seed0/a"


def cell(says: str, changes: dict[str, Any], name: str = PATH, good: dict[str, Any] = CELL) -> Row:
    """A cell as the report reads it."""

    def call(lab: Lab) -> Any:
        file = lab.here / PATH / "cell.json"
        file.parent.mkdir(parents=True)
        write_result(file, {k: v for k, v in {**good, **changes}.items() if v is not DROP})
        return read_cells(lab.here, {"cells": [name], "arms": []})

    return call, says


def report(lab: Lab, **changes: Any) -> Any:
    """The report of somebody else's grid."""
    made = make_grid(lab.tables())
    found = {
        "version": 3, "command": "ablate", "notes": [], "tables": lab.tables(),
        "arms": [{"name": a.name, "levels": a.levels} for a in made.arms], "cells": {PATH: "k"},
    }  # fmt: skip
    for key, value in changes.items():
        inner, last = (found["tables"], key) if key in found["tables"] else (found, key)
        inner[last] = value
    file = lab.here / PATH / "cell.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_result(file, CELL)
    write_result(lab.here / GRID, found)
    return write_report(lab.here)


def others(says: str, **changes: Any) -> Row:
    return (lambda lab: report(lab, **changes)), says


def raw_report(says: str, content: bytes | None) -> Row:
    def call(lab: Lab) -> Any:
        if content is None:
            (lab.here / GRID).mkdir()
        else:
            lab.file(GRID, content)
        return write_report(lab.here)

    return call, says


def mixture(says: str, **tables: Any) -> Row:
    def call(lab: Lab) -> Any:
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"seen": ["a"], "unseen": ["b"], **tables}.items()]
        lab.file("x.toml", "\n".join(lines))
        return Mixture(read_mixture("x.toml"))

    return call, says


def done(says: str, content: bytes) -> Row:
    """A folder with a spoiled cell, that a grid is started in."""

    def call(lab: Lab) -> Any:
        cells = make_grid(lab.tables()).cells()
        lab.file(str(cells[0].path / "cell.json"), content)
        return Store(lab.here).check(cells)

    return call, says


DROP = object()
DEEP = b"x = " + b"[" * 50_000
NAME = "cannot name a folder: use letters"
LEVEL = "cannot name a factor or level: use letters"
EVIL = "x'), __import__('sys').exit(99), Q('form"
AGAIN = "Delete it, and it is run again"

ROWS: dict[str, Row] = {
    # arm files
    "arm that is a directory": toml("neither a .toml file nor one of", None),
    "arm of NUL": toml("x.toml is not valid TOML", b"\0\0"),
    "arm in UTF-16": toml("byte 0 is not UTF-8. Save it as UTF-8", "name = 5".encode("utf-16")),
    "arm in Latin-1": toml("byte 8 is not UTF-8", b"name = '\xe9'"),
    "arm with a key twice": toml("x.toml is not valid TOML: Cannot overwrite", b"name = 'a'\nname = 'b'"),
    "arm nested 50000 deep": toml("x.toml is not valid TOML", DEEP),
    "arm in JSON": toml("x.toml is not valid TOML", b'{"name": "a"}'),
    "arm in YAML": toml("x.toml is not valid TOML", b"name: a\n"),
    "arm of nothing": toml("data: Field required", b""),
    "arm of a path": (lambda lab: load_arm("../../secret"), "No arm '../../secret'"),
    "arm of a number": (lambda lab: load_arm("5"), "No arm '5'"),
    # an arm's values
    "arm called a path": arm(NAME, name="../../home"),
    "arm called an absolute path": arm(NAME, name="/tmp/x"),
    "arm called a drive": arm(NAME, name="C:\\x"),
    "arm called nothing": arm(NAME, name=""),
    "arm called a dot": arm(NAME, name="."),
    "arm called two dots": arm(NAME, name=".."),
    "arm called a hidden file": arm(NAME, name=".ssh"),
    "arm called by look-alike letters": arm(NAME, name="lor\u0430_dpo"),
    "arm called with a line end": arm(NAME, name="a\nb"),
    "arm called with NUL": arm(NAME, name="a\0b"),
    "arm called by 300 letters": arm("at most 200", name="a" * 300),
    "arm called a number": arm("name: Input should be a valid string", name=5),
    "arm whose data are text": arm("data: Input should be", data="cautious_advice"),
    "arm whose data have a negative seed": arm("seed: Input should be greater", data={"name": "x", "seed": -1}),
    "arm whose data have no rows": arm("train: Input should be greater", data={"name": "x", "train": 0}),
    "arm with an unknown table": arm("Unknown key 'adaptor' in .arm.*'adapter'", adaptor={}),
    "arm with an adapter of a path": arm("adapter.type='../lora' is not a PEFT method", adapter={"type": "../lora"}),
    "arm with an adapter of a list": arm("adapter.type=.* is not a PEFT method", adapter={"type": ["lora"]}),
    "arm with an adapter of unknown options": arm("Unknown key 'rnk'", adapter={"type": "lora", "rnk": 8}),
    "arm with an adapter's rank of text": arm(
        "adapter.r='eight': Input should be a valid integer", adapter={"type": "lora", "r": "eight"}
    ),
    "arm with a rank below nothing": arm(r"\[adapter\]: .*rank", adapter={"form": "low_rank", "rank": -1}),
    "arm with options of no adapter": arm("Unknown key 'r'", adapter={"type": "none", "r": 8}),
    "arm with a loss of a path": arm("Unknown loss '../x'", loss={"name": "../x"}),
    "arm with a loss's option of a list": arm("beta=.* must be a finite number", loss={"name": "dpo", "beta": [1]}),
    "arm with upstream's loss and options": arm("Unknown key 'beta'", loss={"name": "upstream", "beta": 1}),
    "arm with a view of a path": arm("Unknown view '../x'", views={"good": {"name": "../x"}}),
    "arm with a view that is no table": arm("good='instruction' must be a table", views={"good": "instruction"}),
    "arm with a bias of a path": arm("Unknown bias '../x'", biases={"../x": {}}),
    "arm with a view of no teacher": arm(r"must be one of \[teachers\]", views={"good": {"name": "teacher"}}),
    "arm with a teacher called a path": arm(
        NAME,
        teachers={"../t": {"chosen": ""}},
        views={"good": {"name": "teacher", "model": "../t"}},
    ),
    "arm with a teacher of nothing": arm("a teacher learns from answers", teachers={"t": {}}),
    "arm with strengths of text": arm("strengths", evaluation={"strengths": "all"}),
    "arm with strengths that are not finite": arm(
        "strengths.0: Input should be a finite", evaluation={"strengths": [float("nan")]}
    ),
    # overrides
    "override without dashes": words("'data.name': overrides are written --table.key value", "data.name", "x"),
    "override without a value": words("--data.name has no value", "--data.name"),
    "override of a value's value": words("--loss.name.x: 'name' is 'dpo', not a table", "--loss.name.x", "5"),
    "override of nothing": words("Unknown key ''", "--", "5"),
    "override of an empty key": words("Unknown key ''", "--data..x", "5"),
    "override nested 50000 deep": words("seed: Input should be", "--data.seed", "[" * 50_000),
    # grids as files
    "grid of a path": (lambda lab: load_grid("../../secret"), "No grid '../../secret'"),
    "grid that is a directory": toml("neither a .toml file nor one of", None, load_grid),
    "grid of NUL": toml("x.toml is not valid TOML", b"\0", load_grid),
    "grid nested": toml("x.toml is not valid TOML", DEEP, load_grid),
    "grid of nothing": toml("tasks: Field required", b"", load_grid),
    # their values
    "grid with a factor that is code": bad(LEVEL, {f"factors/{EVIL}": {"a": {}, "b": {}}}),
    "grid with a level that is code": bad(LEVEL, {"factors/form": {"'); exit(": {}, "bias": {}}}),
    "grid with a factor that is a path": bad(LEVEL, {"factors/../../x": {"a": {}}}),
    "grid with a level of look-alike letters": bad(LEVEL, {"factors/form/bi\u0430s": {}}),
    "grid with a factor that is no table": bad("factors", {"factors": {"form": "bias"}}),
    "grid with a level that is no table": bad("factors.form.bias=5 must be a table", {"factors/form/bias": 5}),
    "grid with data of text in a level": bad("data='x' must be a table", {"factors/form/bias": {"data": "x"}}),
    "grid with a level that patches nothing known": bad("Unknown key 'adaptr'", {"factors/form/bias": {"adaptr": {}}}),
    "grid with two arms of one name": bad("Two arms are called 'base'", {"arms": ["base", "base"]}),
    "grid with an arm whose instruction is about another task": bad(
        "an instruction about 'cautious_advice' at its view 'good'", {"arms": ["base", "vector_lorra"]}
    ),
    "grid with an arm of a path": bad("No arm '../../x'", {"arms": ["../../x"]}),
    "grid with a base of a path": bad("No arm '../x'", {"base": "../x"}),
    "grid with a task that is a path up": bad(NAME, {"tasks": [".."]}),
    "grid with a task's label that is a path": bad(NAME, {"tasks": [{"name": "cautious_advice", "label": "../x"}]}),
    "grid with a task's label that is absolute": bad(NAME, {"tasks": [{"name": "cautious_advice", "label": "/x"}]}),
    "grid with tasks that differ by case": (
        lambda lab: find_tasks([TaskTable(name="a", label="A"), TaskTable(name="b", label="a")]),
        "Two tasks are called 'a': give one a label",
    ),
    "grid without tasks": bad("tasks: List should have at least 1", {"tasks": []}),
    "grid with seeds twice": bad(r"seeds=\[0, 0\] must list every value once", {"seeds": [0, 0]}),
    "grid with a negative seed": bad(r"seeds=\[-1\]", {"seeds": [-1]}),
    "grid with examples of nothing": bad(r"examples=\[0\]", {"examples": [0]}),
    "grid with a neutral file of nothing": (lambda lab: grid(lab, {"neutral": "no.jsonl"}).cells(), "no such file"),
    "grid with a model of no dtype": bad("dtype", {"model/dtype": "float8"}),
    "grid with a model key": bad("Unknown key|Extra inputs|extra", {"model/trust_remote_code": True}),
    "grid whose trainer runs code from the Hub": bad("never run. Remove it", {"trainer/trust_remote_code": True}),
    "grid whose trainer says where it writes": bad(
        "trainer.output_dir='/'.*output.folder", {"trainer/output_dir": "/"}
    ),
    "grid whose trainer is text": bad("trainer", {"trainer": "adam"}),
    "grid with a KL of NaN": bad("kl", {"matched/kl": float("nan")}),
    "grid with a KL of infinity": bad("kl", {"matched/kl": float("inf")}),
    "grid with a largest strength of infinity": bad("largest_strength", {"matched/largest_strength": float("inf")}),
    "grid with a budget of infinity": bad("learning_rate", {"budget/learning_rate": float("inf")}),
    "grid with a budget of no steps": bad("steps", {"budget/steps": []}),
    "grid without a card": bad(r"has no \[card\]", {"card": DROP}),
    "grid with an empty card": bad("problem: String should have at least 1", {"card/problem": ""}),
    "grid without a claim": bad(r"has no \[claim\]", {"claim": DROP}),
    "grid with a claim of an unknown measure": bad(
        "Unknown measure 'acuracy'", {"claim/measure": "acuracy", "claim/strength": "tuned"}
    ),
    "grid with a design of an unknown kind": bad("kind: Input should be", {"design/kind": "all"}),
    "grid with a start of an unknown level": bad("design.start.form='lore'.*'lora'", {"design/start/form": "lore"}),
    # mixtures
    "mixture of a path": (lambda lab: read_mixture("../../x"), "No file '../../x'"),
    "mixture that is a directory": toml("No file 'x.toml'", None, read_mixture),
    "mixture in UTF-16": toml("not UTF-8", "seen = []".encode("utf-16"), read_mixture),
    "mixture of nothing": toml("seen: Field required", b"", read_mixture),
    "mixture with an unknown key": mixture("Unknown key 'unsen'.*'unseen'", unsen=[]),
    "mixture of the same tasks": mixture("data of both seen and unseen tasks", seen=["a"], unseen=["a"]),
    "mixture of a task that is a path": mixture(NAME, seen=[".."]),
    "mixture of too few pairs": mixture("pairs=3 of an unseen task.*the 4 demonstrations", pairs=3),
    "mixture with a negative seed": mixture("seeds.0: Input should be greater", seeds=[-1]),
    "mixture with an arm of a path": mixture("No arm '../x'", arm="../x"),
    "mixture with a steering arm of nothing": mixture("No arm 'nothing'", steering=["nothing"]),
    "mixture with a prompt as its arm": mixture("is a prompt", arm="prompt_contrast"),
    # results
    "result of nothing": result("is damaged .*Delete it", lambda text: b""),
    "result cut off": result("is damaged .*Delete it", lambda text: text[:-5]),
    "result of NUL": result("is damaged .*Delete it", lambda text: bytes(len(text))),
    "result of another number": result("its checksum does not match", lambda text: text.replace(b"1.5", b"1.7")),
    "result of another key": result("its checksum does not match", lambda text: text.replace(b"seconds", b"sekonds")),
    "result with a key twice": result("'version' occurs twice", lambda text: text.replace(b"seconds", b"version")),
    "result that is a list": result("a JSON object is expected, this is list", lambda text: b"[" + text + b"]"),
    "result that is nested": result("is damaged", lambda text: b"[" * 100_000),
    "result that is no UTF-8": result("is not UTF-8", lambda text: text.replace(b"abc", b"a\xffc")),
    # cells
    "cell of another format": cell("has format 3, this version reads 4", {"format": 3}),
    "cell without a format": cell(f"has format None, this version reads 4. {AGAIN}", {"format": DROP}),
    "cell of an older version": cell("is of version 2 .*; 3 and later are read", {"version": 2}, good=OLD_CELL),
    "old cell without a status": cell(f"is not a cell: it has no status. {AGAIN}", {"status": DROP}, good=OLD_CELL),
    "old cell without its key": cell(f"is not a cell: key=None. {AGAIN}", {"key": DROP}, good=OLD_CELL),
    "cell without its key": cell(f"is not a cell: key=None. {AGAIN}", {"facts": {"status": "ok"}}),
    "cell without a status": cell(f"is not a cell: status=None. {AGAIN}", {"facts": {"key": "k"}}),
    "cell with examples of text": cell("is not a record: examples='4'", {"examples": "4"}),
    "cell with a seed that is a truth value": cell("is not a record: seed=True", {"seed": True}),
    "cell with observations of a list": cell("is not a record: observations=", {"observations": ["margin"]}),
    "cell of a path up": cell("is not the path of a cell", {}, "cells/../../etc/n4/seed0/a"),
    "cell of an absolute path": cell("is not the path of a cell", {}, "/etc/passwd"),
    "cell of a path with a line end": cell("is not the path of a cell", {}, PATH + "\n"),
    "cell of a path that is no cell's": cell("is not the path of a cell", {}, "grid.json"),
    "cell that is not there": cell("holds no cells. Run the grid first", {}, "cells/task/n4/seed1/a"),
    "a grid's folder with half a cell": done(f"is damaged .*{AGAIN}", b'{"version": 3, "key'),
    "a grid's folder with a cell of a list": done("this is list", b"[]"),
    "a grid's folder with a cell of other settings": done(
        "was run with other settings", json.dumps(CELL | {"facts": {"key": "other", "status": "ok"}}).encode()
    ),
    # grid.json of others
    "report of a folder without a grid": (lambda lab: write_report(lab.here), "holds no grid"),
    "report of a directory": raw_report("holds no grid", None),
    "report of half a grid": raw_report("is damaged .*Run the grid again", b'{"tables": {'),
    "report of a list": raw_report("this is list", b"[]"),
    "report of no tables": raw_report("grid.json holds no grid", b"{}"),
    "report of nested tables": raw_report("is damaged", b"[" * 100_000),
    "report that is not UTF-8": raw_report("not UTF-8", b"\xff\xff"),
    "report with a factor that is code": others(LEVEL, factors={EVIL: {"a": {}, "b": {}}}),
    "report with cells outside": others("is not the path of a cell", cells={"../../../etc/passwd": "k"}),
    "report with cells that are numbers": others("holds no grid", cells=[5]),
    "report with arms without names": others("holds no grid", arms=[{}]),
    "report with notes of numbers": others("holds no grid", notes=[5]),
    "report with a claim about no arm": others(
        r"\[claim\] is about .*'nobody'",
        claim={"better": "nobody", "than": "form=lora", "measure": "matched_accuracy"},
    ),
    "report without a card": others("holds no grid", card=None),
    "report with an unknown table": others("holds no grid", design={"kind": "full", "x": 1}),
    "report with a start of no level": others(
        "holds no grid", design={"kind": "full", "start": {"form": "x"}, "end": {"form": "y"}}
    ),
}
