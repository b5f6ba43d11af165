"""What a training step costs: ours, stock TRL with PEFT, and the bare matrix products, all in one run.

    python -m steertune.recipes.studies.benchmark --folder runs/benchmark
    python -m steertune.recipes.studies.benchmark --pairs pairs.jsonl --batch 4 8 --folder runs/unequal

The ways to train take short turns, round after round, so that a noisy machine affects all of them equally. Warm-up
steps are not timed. In the first round, our losses first read a whole epoch, which fills the cache and is timed
separately. Rows are random words, all of one length, or the pairs of a file, of which every turn reads a whole epoch.
Peak memory is measured in a separate process for each way. `--growth` also times ours with ten times the
rows. With one thread on a CPU, seconds are CPU seconds of this process, which other programs do not inflate. Two more
steps of every way of ours with the frozen prefix run under torch's profiler, to show where the time goes. Writes
`table.md` and `table.json`; a benchmark that was killed continues with the rows that are missing.
"""

from __future__ import annotations

import gc
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch

from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import ArmError, read_result, write_result, write_whole
from steertune.recipes.lab.memory import peak_memory_gb, reset_peak_memory
from steertune.recipes.lab.options import Count, Option, Threads, whole_number
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress, track
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.studies.timing.floor import floor
from steertune.recipes.studies.timing.rows import Rows
from steertune.recipes.studies.timing.shares import shares
from steertune.recipes.studies.timing.ways import WAYS, Run, Way

ROWS = ["128/64", "512/256", "512/384"]
BATCHES = [4]
ALL = ["*"]


@dataclass(frozen=True)
class Options:
    """What is timed, and how: the options of the command."""

    model: str
    rounds: int
    growth: bool
    ways: list[str]
    no_memory: bool
    folder: Path
    threads: int | None = None


@command
def main(
    rows: Annotated[list[str], Option(help="tokens of a row / of its prompt", metavar="TOKENS/PROMPT ...")] = ROWS,
    tokens: Annotated[int, Count("tokens per batch")] = 1024,
    pairs: Annotated[Path | None, Option(help="a file of pairs to train on in place of --rows")] = None,
    batch: Annotated[
        list[int], Option(parser=whole_number, metavar="N ...", help="with --pairs, rows of a batch")
    ] = BATCHES,
    rounds: Annotated[int, Count("timed turns of every way")] = 3,
    model: Annotated[str, Option(help="embedded, a local folder or a Hub name")] = "embedded",
    threads: Threads = None,
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/benchmark"),
    growth: Annotated[bool, Option("--growth", help="also time ten times the rows")] = False,
    ways: Annotated[
        list[str], Option(help="patterns of the ways to time, such as 'SFT: ours*'", metavar="NAME ...")
    ] = ALL,
    no_memory: Annotated[bool, Option("--no-memory", help="do not measure peak memory")] = False,
    memory_of: Annotated[str | None, Option(hidden=True, help="print the peak memory of this way")] = None,
) -> Result:
    """Measure the rows that the folder lacks, and write the tables."""
    if pairs is not None and growth:
        raise ArmError("--growth compares rows of one length. Leave out --pairs.")
    if pairs is not None and not pairs.is_file():
        raise ArmError(f"--pairs {pairs}: no such file. Give JSON lines with prompt, chosen and rejected.")
    if pairs is None:
        all_rows = [Rows.of_one_length(text, tokens) for text in rows]
    else:
        all_rows = [Rows.of_file(pairs, size) for size in batch]
    begin(threads, only_one=True)
    options = Options(model, rounds, growth, ways, no_memory, folder, threads)
    if memory_of is not None:
        peak = _memory(options, memory_of, all_rows[0])
        return Result(peak, f"{peak:.2f} GB")
    folder.mkdir(parents=True, exist_ok=True)

    # measure the rows that this folder lacks
    sizes = _measured(options)
    with progress("Benchmark", len(all_rows)) as bar:
        for each in all_rows:
            if each.title in [size["title"] for size in sizes]:
                bar.skip()
                continue
            with bar.step(each.title):
                sizes.append(measure(options, each))
                if growth:
                    sizes[-1]["growth"] = growth_of(options, each)
            write_result(folder / "table.json", {"settings": _settings(options), "rows": sizes})
            write_whole(folder / "table.md", page(options, sizes))
    return Result(sizes, page(options, sizes))


def _settings(options: Options) -> dict[str, Any]:
    """Everything that the numbers of some rows depend on."""
    values = {name: getattr(options, name) for name in ("model", "rounds", "growth", "ways", "no_memory")}
    return {**values, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _measured(options: Options) -> list[dict[str, Any]]:
    """The results for rows that a benchmark in this folder has finished.

    Raises:
        ArmError: that benchmark had other settings.
    """
    file = options.folder / "table.json"
    if not file.exists():
        return []
    result = read_result(file, "Delete it to measure everything again.")
    if result.get("settings") != _settings(options):
        raise ArmError(f"{file} has other settings ({result.get('settings')}). Choose another --folder.")
    return result["rows"]


def measure(options: Options, rows: Rows) -> dict[str, Any]:
    """Times, memory and the floor of a step on some rows."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    layer = _layer(model)
    ways = ways_of(options.ways)

    def runs(folder: str) -> dict[str, Run]:
        return {name: Run(way, model, tokenizer, rows, layer, folder) for name, way in ways.items()}

    with progress("Rows", 3) as bar:
        with bar.step("steps", 2):
            times = _timed(runs, rows, options.rounds)
        # memory is measured in other processes, so the trained models must be gone
        gc.collect()
        with bar.step("memory"):
            apart = [] if options.no_memory else list(ways)
            memory = {name: _memory_apart(options, name, rows) for name in track(apart, "way")}
    tokens = {kind: rows.tokens(tokenizer, kind) for kind in {way.kind for way in ways.values()}}
    return {
        "title": rows.title,
        "words": rows.words,
        "layer": layer,
        **times,
        "memory_gb": memory,
        "floor": {name: floor(model, way, tokens[way.kind], layer) for name, way in ways.items()},
    }


def _timed(runs_in: Callable[[str], dict[str, Run]], rows: Rows, rounds: int) -> dict[str, Any]:
    """Seconds of the steps and of the first epoch of every way, and the profile of ours.

    Args:
        runs_in: Makes the runs in a folder; they are freed on return.
        rows: What they train on.
        rounds: How many turns every way takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_in(folder)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        epochs: dict[str, float] = {}
        for turn in track(range(rounds), "round"):
            for name, run in track([*runs.items()], "way"):
                # the first turn warms up: ours with the epoch that fills the cache, the others with one step
                fills = turn == 0 and (WAYS[name].loss is not None or WAYS[name].frozen_prefix)
                steps = run((rows.epoch if fills else not turn) + rows.steps)
                # batches of unequal rows differ, so that a turn counts as a whole
                turns = steps[-rows.steps :]
                seconds[name] += turns if rows.file is None else [mean(turns)]
                if fills:
                    epochs[name] = sum(steps[: rows.epoch])
        profiled = {name: run for name, run in runs.items() if WAYS[name].frozen_prefix and WAYS[name].arms == 1}
        parts = {name: shares(run, rows.steps) for name, run in profiled.items()}
    return {"seconds": seconds, "first_epoch": epochs, "shares": parts}


def _layer(model: Any) -> int:
    """The layer of the vector."""
    return 2 * model.config.num_hidden_layers // 3


def ways_of(patterns: Sequence[str]) -> dict[str, Way]:
    """The ways whose names match, and the ways that they are compared with."""
    names = {name for name in WAYS if any(fnmatchcase(name, pattern) for pattern in patterns)}
    names |= {WAYS[name].baseline for name in names}
    return {name: way for name, way in WAYS.items() if name in names}


def growth_of(options: Options, rows: Rows) -> dict[str, float]:
    """How many times longer a step of ours takes with twenty rows than with two, once the cache is filled."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("SFT: ours, and frozen prefix", "pairs: ours, and frozen prefix"):
            few, many = (
                Run(WAYS[name], model, tokenizer, replace(rows, batch=size, pairs=size // 2), _layer(model), folder)
                for size in (2, 20)
            )
            for run in (few, many):
                run(rows.epoch)
            ratios[name] = median(median(many(rows.steps)) / median(few(rows.epoch)) for _ in range(options.rounds))
    return ratios


def _memory_apart(options: Options, name: str, rows: Rows) -> float:
    """Peak memory of a way in GB, measured in a separate process."""
    words = ["--json", "--memory-of", name, *rows.words, "--model", options.model]
    words += ["--threads", str(options.threads)] if options.threads else []
    command = [sys.executable, "-m", "steertune.recipes.studies.benchmark", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _memory(options: Options, name: str, rows: Rows) -> float:
    """Peak memory of a way in this process, in GB."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    layer = _layer(model)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(WAYS[name], model, tokenizer, rows, layer, folder)
        del model
        gc.collect()
        reset_peak_memory()
        run(2)
    return peak_memory_gb()


def page(options: Options, sizes: list[dict[str, Any]]) -> str:
    """The tables in Markdown, one for all rows of a kind."""
    ways = "" if options.ways == ["*"] else f" --ways {shlex.join(options.ways)}"
    command = (
        f"python -m steertune.recipes.studies.benchmark --model {options.model} {_rows_of_command(sizes)} "
        f"--rounds {options.rounds} --threads {torch.get_num_threads()}"
        f"{' --growth' if options.growth else ''}{ways}{' --no-memory' if options.no_memory else ''}"
    )
    clock = "CPU seconds" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "seconds"
    lines = [
        "# What a training step costs",
        "",
        f"`{command}`: {torch.get_num_threads()} threads, torch {torch.__version__}, TRL {version('trl')}, "
        f"{options.rounds} rounds of a few timed steps per way, interleaved. Median {clock} per step [smallest, "
        "largest]; ratios are ratios of medians. Timed steps are warm (the cache is filled), so a whole run saves "
        "less. Rows of a file are timed over a whole epoch of 4 batches. The first epoch includes the one-time "
        "comparison with the plain path. The floor is the time of the matrix products above the vector and of the "
        "head on labels, at this machine's rate, for the tokens that have to run. On a GPU, TRL's own steps gain: "
        "with Triton, it computes the logits of labelled tokens only.",
    ]
    for at in sizes:
        lines += [
            "",
            f"## {at['title']}; vector on layer {at['layer']}",
            "",
            "| | seconds per step | times faster than TRL + LoRA | times the floor | first epoch / without cache "
            "| peak memory, GB |",
            "|---|---|---|---|---|---|",
        ]
        for name, seconds in at["seconds"].items():
            base = WAYS[name].baseline
            plain = at["first_epoch"].get(f"{name.split(':')[0]}: ours, head on labels")
            epoch = f"{at['first_epoch'][name] / plain:.2f}" if plain and name in at["first_epoch"] else ""
            memory = at["memory_gb"].get(name)
            lines.append(
                f"| {name} | {median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}] "
                f"| {median(at['seconds'][base]) / median(seconds):.2f} "
                f"| {median(seconds) / at['floor'][name]:.2f} | {epoch} "
                f"| {'' if memory is None else format(memory, '.2f')} |"
            )
        lines += ["", *_shares(at["shares"])]
        if "growth" in at:
            grown = ", ".join(f"{ratio:.1f} ({name})" for name, ratio in at["growth"].items())
            lines += ["", f"Ten times the rows (20 instead of 2) take {grown} times as long."]
    return "\n".join(lines) + "\n"


def _rows_of_command(sizes: list[dict[str, Any]]) -> str:
    """The options that select all these rows; a file is given by its name alone."""
    values_of: dict[str, list[str]] = {}
    for at in sizes:
        for option, value in zip(at["words"][::2], at["words"][1::2], strict=True):
            values = values_of.setdefault(option, [])
            values += [] if value in values else [Path(value).name if option == "--pairs" else value]
    return " ".join(word for option, values in values_of.items() for word in (option, *values))


def _shares(parts: dict[str, dict[str, float]]) -> list[str]:
    """The table of where the time of our steps goes."""
    if not parts:
        return []
    kinds = list(next(iter(parts.values())))
    lines = [f"| where a step goes, % | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    return lines + [
        f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in shares.values())} |"
        for name, shares in parts.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
