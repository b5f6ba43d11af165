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

import argparse
import gc
import json
import logging
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm

from steertune.recipes.lab.arm import ModelTable
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import ArmError, read_result, write_result, write_whole
from steertune.recipes.lab.measures import peak_memory_gb, reset_peak_memory
from steertune.recipes.lab.processes import begin, command, positive
from steertune.recipes.studies.timing.floor import floor
from steertune.recipes.studies.timing.shares import shares
from steertune.recipes.studies.timing.ways import AGAINST, EPOCH, STEPS, WAYS, Run, Way


def _row(text: str) -> tuple[int, int]:
    """`tokens/prompt tokens`."""
    length, prompt = map(int, text.split("/"))
    if not 0 < prompt < length - 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1 token of prompt and 2 of answer")
    return length, prompt


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=_row,
        default=[(128, 64), (512, 256), (512, 384)],
        help="tokens of a row / of its prompt (128/64 512/256 512/384)",
    )
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens per batch (1024)")
    parser.add_argument("--rounds", type=positive, default=3, help="timed turns of every way (3)")
    parser.add_argument("--model", default="embedded", help="embedded, a local folder or a Hub name (embedded)")
    parser.add_argument("--threads", type=positive, help="CPU threads (all cores)")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"), help="where the results are written")
    parser.add_argument("--growth", action="store_true", help="also time ten times the rows")
    parser.add_argument("--ways", nargs="+", default=["*"], help="patterns of the ways to time, such as `SFT: ours*`")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--memory-of", choices=[*WAYS], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    begin(options.threads, only_one=True)
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    if options.memory_of:
        print(json.dumps(_memory(options, options.memory_of, *options.rows[0])))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)

    # measure the row lengths that this folder lacks
    sizes = _measured(options)
    for row in options.rows:
        if row not in [(size["length"], size["prompt"]) for size in sizes]:
            sizes.append(measure(options, *row) | ({"growth": growth(options, *row)} if options.growth else {}))
            write_result(options.folder / "table.json", {"settings": _settings(options), "rows": sizes})
            write_whole(options.folder / "table.md", page(options, sizes))
    print(page(options, sizes))
    return 0


def _settings(options: Any) -> dict[str, Any]:
    """Everything that the numbers of a row length depend on."""
    values = {name: getattr(options, name) for name in ("model", "tokens", "rounds", "growth", "ways", "no_memory")}
    return {**values, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _measured(options: Any) -> list[dict[str, Any]]:
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


def measure(options: Any, length: int, prompt: int) -> dict[str, Any]:
    """Times, memory and the floor at one row length.

    Args:
        options: Of the command line.
        length: Tokens of a row.
        prompt: Tokens of its prompt.
    """
    model, tokenizer = load_model(ModelTable(name=options.model))
    rows, layer = _sizes(options, model, length)
    ways = _asked(options.ways)

    def runs(folder: str) -> dict[str, Run]:
        return {name: Run(way, model, tokenizer, (length, prompt), rows, layer, folder) for name, way in ways.items()}

    times = _timed(runs, options.rounds, f"{prompt} of {length} tokens")
    # memory is measured in other processes, so the trained models must be gone
    gc.collect()
    apart = [] if options.no_memory else tqdm(ways, desc="Memory", unit="way")
    memory = {name: _memory_apart(options, name, length, prompt) for name in apart}
    return {
        "length": length,
        "prompt": prompt,
        "rows": rows,
        "layer": layer,
        **times,
        "memory_gb": memory,
        "floor": {name: floor(model, way, length, prompt, rows, layer) for name, way in ways.items()},
    }


def _timed(runs_in: Callable[[str], dict[str, Run]], rounds: int, title: str) -> dict[str, Any]:
    """Seconds of the steps and of the first epoch of every way, and the profile of ours.

    Args:
        runs_in: Makes the runs in a folder; they are freed on return.
        rounds: How many turns every way takes.
        title: Of the progress bar.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_in(folder)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        epochs: dict[str, float] = {}
        for turn in tqdm(range(rounds), desc=title, unit="round"):
            for name, run in tqdm(runs.items(), desc="Ways", leave=False):
                # the first turn warms up: ours with the epoch that fills the cache, the others with one step
                fills = turn == 0 and WAYS[name].loss is not None
                steps = run((EPOCH if fills else not turn) + STEPS)
                seconds[name] += steps[-STEPS:]
                if fills:
                    epochs[name] = sum(steps[:EPOCH])
        profiled = {name: run for name, run in runs.items() if WAYS[name].frozen_prefix and WAYS[name].arms == 1}
        parts = {name: shares(run) for name, run in tqdm(profiled.items(), desc="Profile", unit="way")}
    return {"seconds": seconds, "first_epoch": epochs, "shares": parts}


def _sizes(options: Any, model: Any, length: int) -> tuple[int, int]:
    """Rows of a batch, and the layer of the vector."""
    return max(2, options.tokens // length), 2 * model.config.num_hidden_layers // 3


def _asked(patterns: Sequence[str]) -> dict[str, Way]:
    """The ways whose names match, and the ways that they are compared with."""
    names = {name for name in WAYS if any(fnmatchcase(name, pattern) for pattern in patterns)}
    names |= {AGAINST[WAYS[name].kind] for name in names}
    return {name: way for name, way in WAYS.items() if name in names}


def growth(options: Any, length: int, prompt: int) -> dict[str, float]:
    """How many times longer a step of ours takes with twenty rows than with two, once the cache is filled."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    layer = 2 * model.config.num_hidden_layers // 3
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(
            ("SFT: ours, and frozen prefix", "pairs: ours, and frozen prefix"), desc="Growth", unit="way"
        ):
            few, many = (Run(WAYS[name], model, tokenizer, (length, prompt), rows, layer, folder) for rows in (2, 20))
            for run in (few, many):
                run(EPOCH)
            ratios[name] = median(median(many(STEPS)) / median(few(EPOCH)) for _ in range(options.rounds))
    return ratios


def _memory_apart(options: Any, name: str, length: int, prompt: int) -> float:
    """Peak memory of a way in GB, measured in a process of its own."""
    words = ["--memory-of", name, "--rows", f"{length}/{prompt}", "--tokens", str(options.tokens)]
    words += ["--model", options.model, *(["--threads", str(options.threads)] if options.threads else [])]
    command = [sys.executable, "-m", "steertune.recipes.studies.benchmark", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def _memory(options: Any, name: str, length: int, prompt: int) -> float:
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


def page(options: Any, sizes: list[dict[str, Any]]) -> str:
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
