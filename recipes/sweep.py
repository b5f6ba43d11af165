"""Choose layer and strength: what every setting does to the behaviour, and what it costs in fluency.

    python -m steertune.recipes.sweep cautious_advice                           # the mean difference
    python -m steertune.recipes.sweep my_pairs/ --direction lat --layers 8 12 0.5 --strengths 1 2 4
    python -m steertune.recipes.sweep my_pairs/ --arm vector_dpo                  # trained at every layer
    python -m steertune.recipes.sweep my_pairs/ --arm runs/vector_dpo-my_pairs    # as that run was trained

A direction has strength 1 where it is as long as the mean difference of the two answers' states at that layer, so that
methods and layers can be compared; an arm has strength 1 as trained. Settings are measured on validation rows, and one
is recommended, with its reason; only that one is read on test rows, once. The page has heat maps, the Pareto front and
the slope of every held-out example. `adapter/` is the recommended vector, its strength baked in.

What the lower layers compute is shared: one pass of the base model serves all layers. An interrupted sweep goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast, get_args

from datasets import disable_progress_bars
from pydantic import ValidationError
from tqdm.auto import tqdm

from steertune.adapters import directions
from steertune.adapters.blocks import find_blocks, resolve_layers
from steertune.adapters.card import versions, write_card
from steertune.adapters.types import Site
from steertune.recipes.lab import scorers
from steertune.recipes.lab.arm import ArmError, ModelTable, reasons
from steertune.recipes.lab.cards import of_sweep
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import read_result, write_result
from steertune.recipes.lab.processes import begin, command
from steertune.recipes.lab.splits import SplitTable
from steertune.recipes.lab.training import claim
from steertune.recipes.sweeping.bench import Bench
from steertune.recipes.sweeping.choose import choose
from steertune.recipes.sweeping.page import on_test, write_page
from steertune.recipes.sweeping.settings import Limits, SweepTable, at, read_arm
from steertune.recipes.sweeping.sources import Source, bake
from steertune.trainers import NonFiniteError

LAYERS = [0.1, 0.25, 0.4, 0.55, 0.7, 0.85]
STRENGTHS = [0.5, 1.0, 2.0, 4.0, 8.0]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for a sweep that cannot run."""
    options, overrides = _parser().parse_known_args(argv)
    disable_progress_bars()
    words = list(sys.argv[1:] if argv is None else argv)
    begin(options.threads, only_one=True)
    result, page = run(options, overrides, words)
    print(json.dumps(result, indent=1) if options.json else f"{page.read_text(encoding='utf-8')}\nThis page: {page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("task", help="an embedded task, a path or a Hub name, as data.name: preference pairs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--direction", metavar="NAME", help=f"one of {', '.join(directions.names())} (mean_difference)")
    what.add_argument(
        "--arm",
        help="trained at every layer: a name in recipes/configs/arms/, a .toml file (both take --table.key value),\n"
        "or the folder of a training run",
    )
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="indices, fractions of the depth, or 'all'")
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS, help="negative ones too, but not 0")
    parser.add_argument("--sites", nargs="+", default=["block"], help=f"of {', '.join(get_args(Site))} (block)")
    parser.add_argument("--model", help="embedded, a local folder or a Hub name (embedded, or the arm's)")
    parser.add_argument("--train", type=int, help="training pairs (32, or the arm's)")
    parser.add_argument("--validation", type=int, default=24, help="pairs that choose (24)")
    parser.add_argument("--test", type=int, default=40, help="pairs of the report (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the training rows and of training (0)")
    parser.add_argument(
        "--scorer",
        help=f"score generated answers too: {', '.join(scorers.names())}, or a table such as\n"
        '\'{kind = "rule", pattern = "careful"}\'; then it decides in place of the pair accuracy',
    )
    parser.add_argument("--scorer-rows", type=int, default=40, help="pairs that the scorer is fitted on (40)")
    parser.add_argument("--generations", type=int, default=4, help="answers a setting generates (4)")
    parser.add_argument("--new-tokens", type=int, default=24, help="longest answer (24)")
    for name, field in Limits.model_fields.items():
        parser.add_argument(f"--max-{name}", type=float, default=field.default, help=f"limit ({field.default})")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    parser.add_argument("--folder", type=Path, help="(runs/sweep-<what>-<task>)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def run(options: argparse.Namespace, overrides: list[str], words: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """Sweep, recommend, read the recommended setting on test rows, and write the page.

    Returns:
        What `result.json` holds, and the page.

    Raises:
        ArmError: a request that cannot be met, or a folder that holds something else.
    """
    started = time.monotonic()
    table, model, tokenizer = request(options, overrides)
    name = table.direction if table.arm is None else table.arm.name
    folder = options.folder or Path("runs") / f"sweep-{name}-{table.task.strip('./').replace('/', '-')}"
    bench = Bench(table, model, tokenizer)  # refuses bad rows before anything is written
    _ = bench.scorer
    claim(folder, table, main_process=True)
    print(_plan(table, bench), file=sys.stderr)
    cells = measure(bench, folder)
    ok = [cell for cell in cells if cell["status"] == "ok"]
    choice = choose(ok, bench.base("validation"), table.limits)
    result: dict[str, Any] = {
        "settings": table.model_dump(mode="json"),
        "command": as_typed(words),
        "base": {"validation": bench.base("validation")},
        "cells": cells,
        "reason": choice.reason,
        "recommended": None,
        "scorer": bench.scorer.note if bench.scorer is not None else None,
        "versions": versions(),
    }
    if choice.cell is not None:
        where = {key: choice.cell[key] for key in ("site", "layer", "strength")}
        adapter = Source(bench).model(where["site"], where["layer"], folder / home_of(where["site"], where["layer"]))
        result["base"]["test"] = bench.base("test")
        with bench.remembering(adapter):
            test = bench.measured(adapter, where["strength"], "test")
        bake(adapter, where["strength"])
        adapter.save_pretrained(str(folder / "adapter"))
        result |= {"recommended": where, "test": {**where, **test}, "use": _use(where)}
        asked = {"answers": bench.rows("test"), "neutral_answers": bench.neutral("test")}
        result["prompts"] = {key: rows["prompt"][: table.generations] for key, rows in asked.items() if key in test}
    result["seconds"] = time.monotonic() - started
    page = write_page(folder, result)
    if choice.cell is not None:
        write_card(folder / "adapter", of_sweep(result, on_test(result)))
    write_result(folder / "result.json", result)  # last: it says that the sweep is finished
    return result, page


def request(options: argparse.Namespace, overrides: list[str]) -> tuple[SweepTable, Any, Any]:
    """What is asked for, checked against the model; the model and its tokenizer.

    Raises:
        ArmError: a value that no sweep can have.
    """
    arm = None if options.arm is None else read_arm(options.arm, overrides)
    if arm is None and overrides:
        raise ArmError(f"Unknown arguments {overrides}: --table.key value changes an --arm.")
    direction = None if arm is not None else options.direction or "mean_difference"
    if direction is not None:
        directions.get(direction)
    wanted = ModelTable() if arm is None else arm.model
    wanted = wanted if options.model is None else ModelTable(name=options.model)
    if not options.strengths or not options.layers:
        raise ArmError("--layers and --strengths: one or more of each.")
    for site in options.sites:
        if arm is not None and site in get_args(Site):
            at(arm, site, 0)
    scorer = None if options.scorer is None else _scorer(options.scorer)
    model, tokenizer = load_model(wanted)
    try:
        layers = resolve_layers(_layers(options.layers), len(find_blocks(model)))
        table = SweepTable(
            task=options.task,
            model=wanted,
            direction=direction,
            arm=arm,
            layers=layers,
            sites=list(dict.fromkeys(options.sites)),
            strengths=options.strengths,
            train=options.train or (32 if arm is None else arm.data.train),
            splits=SplitTable(
                validation=options.validation, test=options.test, scorer=options.scorer_rows if scorer else 0
            ),
            seed=options.seed,
            scorer=scorer,
            generations=options.generations,
            new_tokens=options.new_tokens,
            limits=Limits(**{name: getattr(options, f"max_{name}") for name in Limits.model_fields}),
        )
    except ValidationError as error:
        raise ArmError(reasons(error)) from error
    if scorer and not table.generations:
        raise ArmError("--scorer scores generated answers: --generations 1 or more.")
    return table, model, tokenizer


def measure(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """Every setting on validation rows, from the top layer down; what is there is not measured again."""
    table, source = bench.table, Source(bench)
    places = [(site, layer) for site in table.sites for layer in sorted(table.layers, reverse=True)]
    found = {}
    with tqdm(total=len(places) * len(table.strengths), desc="Settings", unit="setting") as bar:
        for site, layer in places:
            home = folder / home_of(site, layer)
            home.mkdir(parents=True, exist_ok=True)
            for cell in _of_place(bench, source, site, layer, home, bar):
                found[site, layer, cell["strength"]] = cell
    order = [(site, layer, s) for site in table.sites for layer in table.layers for s in table.strengths]
    return [found[key] for key in order]


def _of_place(
    bench: Bench, source: Source, site: str, layer: int, home: Path, bar: tqdm[Any]
) -> Iterator[dict[str, Any]]:
    """The settings of one place; its adapter is made, and its lower blocks are read, if one of them is missing."""
    files = {strength: home / f"{strength:g}.json" for strength in bench.table.strengths}
    with ExitStack() as stack:
        model = None
        for strength, file in files.items():
            if not file.is_file():
                bar.set_postfix_str(f"{site} {layer} at {strength:g}")
                if model is None:
                    model = _made(source, site, layer, home)
                    if not isinstance(model, NonFiniteError):
                        stack.enter_context(bench.remembering(model))
                cell = _cell(bench, model, strength)
                write_result(file, {"site": site, "layer": layer, "strength": strength, **cell})
            bar.update()
            yield read_result(file, "Delete it, and it is measured again.")


def home_of(site: str, layer: int) -> Path:
    """Where the adapter and the settings of a place are kept, in the sweep's folder."""
    return Path("cells") / f"{site}-{layer}"


def _made(source: Source, site: str, layer: int, home: Path) -> Any:
    """The steered model; a training that diverged is a result."""
    try:
        return source.model(cast(Site, site), layer, home)
    except NonFiniteError as error:
        return error


def _cell(bench: Bench, model: Any, strength: float) -> dict[str, Any]:
    if isinstance(model, NonFiniteError):
        return {"status": "diverged", "error": str(model)}
    return {"status": "ok", **bench.measured(model, strength, "validation")}


def _plan(table: SweepTable, bench: Bench) -> str:
    """What will be done and how long it takes, from the pass of the base model that is needed anyway."""
    start = time.monotonic()
    bench.base("validation")
    base = time.monotonic() - start
    depth = len(find_blocks(bench.model))
    above = sum(1 - (layer + 1) / depth for layer in table.layers) * len(table.sites)
    cells = len(table.layers) * len(table.sites) * len(table.strengths)
    return (
        f"{table.what[0].upper()}{table.what[1:]} on {table.task}: layers {table.layers} × strengths "
        f"{table.strengths}"
        + (f" × sites {table.sites}" if table.sites != ["block"] else "")
        + f", {cells} settings\n"
        f"  {table.train} training, {table.splits.validation} validation and {table.splits.test} test pairs\n"
        f"  about {base * (above * len(table.strengths) + 3) / 60:.0f} to {base * (cells + 3) / 60:.0f} minutes"
        + (", and training at every layer" if table.arm is not None else "")
    )


def _layers(words: Sequence[Any]) -> Any:
    if [str(word) for word in words] == ["all"]:
        return "all"
    found = []
    for word in words:
        try:
            value = float(word) if "." in str(word) else int(word)
        except ValueError:
            raise ArmError(f"--layers {word!r}: an index, a fraction of the depth below 1, or 'all' alone.") from None
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ArmError(f"--layers {word}: indices count from 0, fractions of the depth are in [0, 1).")
        found.append(value)
    return found


def _scorer(text: str) -> dict[str, Any]:
    """The scorer's table, checked."""
    try:
        table = tomllib.loads(f"value = {text}")["value"] if text.lstrip().startswith("{") else {"kind": text}
    except tomllib.TOMLDecodeError as error:
        raise ArmError(f"--scorer {text}: no TOML table: {error}") from error
    scorers.read(table)
    return table


def as_typed(words: Sequence[str]) -> str:
    """The command that ran it, without where things are on this machine."""
    words = list(words)
    for i, word in enumerate(words[:-1]):
        if word == "--folder":
            words[i + 1] = "FOLDER"
    return shlex.join(["python", "-m", "steertune.recipes.sweep", *words])


def _use(where: dict[str, Any]) -> list[str]:
    return [
        f"`adapter/` in this folder is this vector with its strength {where['strength']:g} baked in: it is loaded as "
        "any adapter, and strength 1 is what was measured here.",
        "",
        "```python",
        "import steertune.adapters  # makes the method known to PEFT",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base, "adapter")',
        "```",
    ]


if __name__ == "__main__":
    sys.exit(main())
