"""What a training step costs: ours, stock TRL with PEFT, and the bare matrix products, all in one run.

    python -m steertune.recipes.studies.benchmark --folder runs/benchmark

The ways to train take short turns, round after round, so that a noisy machine affects all of them equally. Warm-up
steps are not timed. In the first round, our losses first read a whole epoch, which fills the cache and is timed
separately. Peak memory is measured in a separate process for each way. `--growth` also times ours with ten times the
rows. With one thread on a CPU, seconds are CPU seconds of this process, which other programs do not inflate. Two more
steps of every way of ours with the frozen prefix run under torch's profiler, to show where the time goes. Writes
`table.md` and `table.json`; a benchmark that was killed continues with the row lengths that are missing.
"""

from __future__ import annotations

import gc
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch

from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import ArmError, read_result, write_result, write_whole
from steertune.recipes.lab.memory import peak_memory_gb, reset_peak_memory
from steertune.recipes.lab.options import Count, Option, Threads
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress, track
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.studies.timing.floor import floor
from steertune.recipes.studies.timing.shares import shares
from steertune.recipes.studies.timing.ways import AGAINST, EPOCH, STEPS, WAYS, Run, Way

ROWS = ["128/64", "512/256", "512/384"]
ALL = ["*"]


def row(text: str) -> tuple[int, int]:
    """`tokens/prompt tokens`."""
    try:
        length, prompt = map(int, text.split("/"))
    except ValueError:
        length, prompt = 0, 0
    if not 0 < prompt < length - 1:
        raise ArmError(f"--rows {text}: TOKENS/PROMPT, with at least 1 token of prompt and 2 of answer.")
    return length, prompt


@dataclass(frozen=True)
class Options:
    """What is timed, and how: the options of the command."""

    model: str
    tokens: int
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
    """Measure the row lengths that the folder lacks, and write the tables."""
    lengths = [row(text) for text in rows]
    begin(threads, only_one=True)
    options = Options(model, tokens, rounds, growth, ways, no_memory, folder, threads)
    if memory_of is not None:
        peak = _memory(options, memory_of, *lengths[0])
        return Result(peak, f"{peak:.2f} GB")
    folder.mkdir(parents=True, exist_ok=True)

    # measure the row lengths that this folder lacks
    sizes = _measured(options)
    with progress("Benchmark", len(lengths)) as bar:
        for length, prompt in lengths:
            if (length, prompt) in [(size["length"], size["prompt"]) for size in sizes]:
                bar.skip()
                continue
            with bar.step(f"{prompt} of {length} tokens"):
                sizes.append(measure(options, length, prompt))
                if growth:
                    sizes[-1]["growth"] = growth_of(options, length, prompt)
            write_result(folder / "table.json", {"settings": _settings(options), "rows": sizes})
            write_whole(folder / "table.md", page(options, sizes))
    return Result(sizes, page(options, sizes))


def _settings(options: Options) -> dict[str, Any]:
    """Everything that the numbers of a row length depend on."""
    values = {name: getattr(options, name) for name in ("model", "tokens", "rounds", "growth", "ways", "no_memory")}
    return {**values, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _measured(options: Options) -> list[dict[str, Any]]:
    """The results for row lengths that a benchmark in this folder has finished.

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


def measure(options: Options, length: int, prompt: int) -> dict[str, Any]:
    """Times, memory and the floor for rows of `length` tokens, `prompt` of them prompt."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    rows, layer = _sizes(options, model, length)
    ways = ways_of(options.ways)

    def runs(folder: str) -> dict[str, Run]:
        return {name: Run(way, model, tokenizer, (length, prompt), rows, layer, folder) for name, way in ways.items()}

    with progress("Rows", 3) as bar:
        with bar.step("steps", 2):
            times = _timed(runs, options.rounds)
        # memory is measured in other processes, so the trained models must be gone
        gc.collect()
        with bar.step("memory"):
            apart = [] if options.no_memory else list(ways)
            memory = {name: _memory_apart(options, name, length, prompt) for name in track(apart, "way")}
    return {
        "length": length,
        "prompt": prompt,
        "rows": rows,
        "layer": layer,
        **times,
        "memory_gb": memory,
        "floor": {name: floor(model, way, length, prompt, rows, layer) for name, way in ways.items()},
    }


def _timed(runs_in: Callable[[str], dict[str, Run]], rounds: int) -> dict[str, Any]:
    """Seconds of the steps and of the first epoch of every way, and the profile of ours. `runs_in` makes the runs in a
    folder; they are freed on return."""
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_in(folder)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        epochs: dict[str, float] = {}
        for turn in track(range(rounds), "round"):
            for name, run in track([*runs.items()], "way"):
                # the first turn warms up: ours with the epoch that fills the cache, the others with one step
                fills = turn == 0 and WAYS[name].loss is not None
                steps = run((EPOCH if fills else not turn) + STEPS)
                seconds[name] += steps[-STEPS:]
                if fills:
                    epochs[name] = sum(steps[:EPOCH])
        profiled = {name: run for name, run in runs.items() if WAYS[name].frozen_prefix and WAYS[name].arms == 1}
        parts = {name: shares(run) for name, run in profiled.items()}
    return {"seconds": seconds, "first_epoch": epochs, "shares": parts}


def _sizes(options: Options, model: Any, length: int) -> tuple[int, int]:
    """Rows of a batch, and the layer of the vector."""
    return max(2, options.tokens // length), 2 * model.config.num_hidden_layers // 3


def ways_of(patterns: Sequence[str]) -> dict[str, Way]:
    """The ways whose names match, and the ways that they are compared with."""
    names = {name for name in WAYS if any(fnmatchcase(name, pattern) for pattern in patterns)}
    names |= {AGAINST[WAYS[name].kind] for name in names}
    return {name: way for name, way in WAYS.items() if name in names}


def growth_of(options: Options, length: int, prompt: int) -> dict[str, float]:
    """How many times longer a step of ours takes with twenty rows than with two, once the cache is filled."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    layer = 2 * model.config.num_hidden_layers // 3
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("SFT: ours, and frozen prefix", "pairs: ours, and frozen prefix"):
            few, many = (Run(WAYS[name], model, tokenizer, (length, prompt), rows, layer, folder) for rows in (2, 20))
            for run in (few, many):
                run(EPOCH)
            ratios[name] = median(median(many(STEPS)) / median(few(EPOCH)) for _ in range(options.rounds))
    return ratios


def _memory_apart(options: Options, name: str, length: int, prompt: int) -> float:
    """Peak memory of a way in GB, measured in a process of its own."""
    words = ["--json", "--memory-of", name, "--rows", f"{length}/{prompt}", "--tokens", str(options.tokens)]
    words += ["--model", options.model, *(["--threads", str(options.threads)] if options.threads else [])]
    command = [sys.executable, "-m", "steertune.recipes.studies.benchmark", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _memory(options: Options, name: str, length: int, prompt: int) -> float:
    """Peak memory of a way in this process, in GB."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    rows, layer = _sizes(options, model, length)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(WAYS[name], model, tokenizer, (length, prompt), rows, layer, folder)
        del model
        gc.collect()
        reset_peak_memory()
        run(2)
    return peak_memory_gb()


def page(options: Options, sizes: list[dict[str, Any]]) -> str:
    """The tables in Markdown, one for every row length."""
    rows = " ".join(f"{at['length']}/{at['prompt']}" for at in sizes)
    ways = "" if options.ways == ["*"] else f" --ways {shlex.join(options.ways)}"
    command = (
        f"python -m steertune.recipes.studies.benchmark --model {options.model} --rows {rows} "
        f"--tokens {options.tokens} --rounds {options.rounds} --threads {torch.get_num_threads()}"
        f"{' --growth' if options.growth else ''}{ways}{' --no-memory' if options.no_memory else ''}"
    )
    clock = "CPU seconds" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "seconds"
    lines = [
        "# What a training step costs",
        "",
        f"`{command}`: {torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds of "
        f"{STEPS} timed steps per way, interleaved. Median {clock} per step [smallest, largest]; ratios are ratios of "
        "medians. Timed steps are warm (the cache is filled) and all rows have the same length, so a whole run saves "
        f"less. The first epoch has {EPOCH} steps and includes the one-time comparison with the plain path. The floor "
        "is the time of the matrix products above the vector and of the head on labels, at this machine's rate, for "
        "the tokens that have to run.",
    ]
    for at in sizes:
        lines += [
            "",
            f"## {at['rows']} rows of {at['length']} tokens, {at['prompt']} of them prompt; vector on layer "
            f"{at['layer']}",
            "",
            "| | seconds per step | times faster than TRL + LoRA | times the floor | first epoch / without cache "
            "| peak memory, GB |",
            "|---|---|---|---|---|---|",
        ]
        for name, seconds in at["seconds"].items():
            base = AGAINST[WAYS[name].kind]
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
