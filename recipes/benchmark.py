"""What a training step costs: stock TRL + PEFT against ours, all in one run, and against the bare matrix products.

    python -m steertune.recipes.benchmark --folder runs/benchmark

Every way trains in short turns, one after the other and round after round, so that a noisy machine is equally noisy to
all. A step to warm up is not timed. In the first round our losses read a whole epoch before, which fills the memo, and
is timed as such. Peak memory comes from a process of its own for each way. `--growth` times ours with ten times the
rows as well. With one thread on a CPU, seconds are CPU seconds of this process, which other programs on the machine do
not stretch. Writes `table.md` and `table.json`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import BeftConfig, LoraConfig, PeftConfig
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.arm import ModelTable
from steertune.recipes.data import load_model
from steertune.recipes.measures import peak_memory_gb, reset_peak_memory
from steertune.recipes.processes import begin, command, positive
from steertune.recipes.training import write_whole
from steertune.trainers import FrozenPrefix, SteeringDPOTrainer, SteeringSFTTrainer, share_weights, train_together

_STEPS = 2  # timed, a turn
_EPOCH = 8  # batches of the data set


@dataclass(frozen=True)
class Way:
    """One way to train: data kind, adapter at a layer, loss, whether the frozen prefix is used, how many such arms at
    once (times are per arm)."""

    kind: str
    adapter: Callable[[int], PeftConfig | None]
    loss: str | None = None
    frozen_prefix: bool = False
    arms: int = 1


def _row(text: str) -> tuple[int, int]:
    """`tokens/prompt tokens`."""
    length, prompt = map(int, text.split("/"))
    if not 0 < prompt < length - 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 token of prompt and 2 of answer")
    return length, prompt


def _lora(layer: int) -> PeftConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _beft(layer: int) -> PeftConfig:
    return BeftConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")


def _vector(layer: int) -> PeftConfig:
    return SteeringVectorConfig(layers=layer)


def _on_completions(layer: int) -> PeftConfig:
    return SteeringVectorConfig(layers=layer, positions="completion")


WAYS = {
    "SFT: TRL + LoRA r8": Way("sft", _lora),
    "SFT: TRL + BEFT": Way("sft", _beft),
    "SFT: TRL, full finetuning": Way("sft", lambda layer: None),
    "SFT: TRL + our vector": Way("sft", _vector),
    "SFT: ours, head on labels": Way("sft", _vector, "cross_entropy"),
    "SFT: ours, and frozen prefix": Way("sft", _vector, "cross_entropy", True),
    "SFT: ours, on completions only": Way("sft", _on_completions, "cross_entropy", True),
    "pairs: TRL + LoRA r8": Way("dpo", _lora),
    "pairs: TRL + BEFT": Way("dpo", _beft),
    "pairs: TRL + our vector": Way("dpo", _vector),
    "pairs: ours, head on labels": Way("dpo", _vector, "dpo"),
    "pairs: ours, and frozen prefix": Way("dpo", _vector, "dpo", True),
    "pairs: ours, on completions only": Way("dpo", _on_completions, "dpo", True),
    "pairs: ours, and frozen prefix, 4 arms together": Way("dpo", _vector, "dpo", True, arms=4),
}
"""With an adapter of its own and `loss=None`, `frozen_prefix=False`, our trainers are TRL's."""
AGAINST = {"sft": "SFT: TRL + LoRA r8", "dpo": "pairs: TRL + LoRA r8"}


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
        help="tokens of a row / of its prompt",
    )
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens of a batch")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--growth", action="store_true", help="time ten times the rows as well")
    parser.add_argument("--ways", nargs="+", default=["*"], help="only ways with such names, as `SFT: ours*`")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--memory-of", choices=[*WAYS], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    begin(options.threads, only_one=True)
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    if options.memory_of:
        print(json.dumps(_memory(options, options.memory_of, *options.rows[0])))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for row in options.rows:
        found.append(measure(options, *row) | ({"growth": growth(options, *row)} if options.growth else {}))
        write_whole(options.folder / "table.json", json.dumps(found, indent=1))
        write_whole(options.folder / "table.md", page(options, found))
    print(page(options, found))
    return 0


def measure(options: Any, length: int, prompt: int) -> dict[str, Any]:
    """Times, memory and the floor at one row length."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    layer = 2 * model.config.num_hidden_layers // 3
    rows, ways = max(2, options.tokens // length), _asked(options.ways)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Run(way, model, tokenizer, (length, prompt), rows, layer, folder) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        epochs: dict[str, float] = {}
        for turn in tqdm(range(options.rounds), desc=f"{prompt} of {length} tokens", unit="round"):
            for name, run in tqdm(runs.items(), desc="Ways", leave=False):
                filled = turn == 0 and WAYS[name].loss is not None
                found = run((_EPOCH if filled else not turn) + _STEPS)
                seconds[name] += found[-_STEPS:]
                if filled:
                    epochs[name] = sum(found[:_EPOCH])
    apart = [] if options.no_memory else tqdm(ways, desc="Memory", unit="way")
    memory = {name: _memory_apart(options, name, length, prompt) for name in apart}
    return {
        "length": length,
        "prompt": prompt,
        "rows": rows,
        "layer": layer,
        "seconds": seconds,
        "first_epoch": epochs,
        "memory_gb": memory,
        "floor": {name: floor(model, way, length, prompt, rows, layer) for name, way in ways.items()},
    }


def _asked(patterns: Sequence[str]) -> dict[str, Way]:
    """The ways with such names, and what they are compared with."""
    asked = {name for name in WAYS if any(fnmatchcase(name, pattern) for pattern in patterns)}
    asked |= {AGAINST[WAYS[name].kind] for name in asked}
    return {name: way for name, way in WAYS.items() if name in asked}


def growth(options: Any, length: int, prompt: int) -> dict[str, float]:
    """How much longer a step of ours takes with twenty rows than with two, its memo filled."""
    model, tokenizer = load_model(ModelTable(name=options.model))
    layer = 2 * model.config.num_hidden_layers // 3
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(
            ("SFT: ours, and frozen prefix", "pairs: ours, and frozen prefix"), desc="Growth", unit="way"
        ):
            few, many = (Run(WAYS[name], model, tokenizer, (length, prompt), rows, layer, folder) for rows in (2, 20))
            for run in (few, many):
                run(_EPOCH)
            found[name] = median(median(many(_STEPS)) / median(few(_EPOCH)) for _ in range(options.rounds))
    return found


class Run:
    """The trainer of a way (or its trainers), each on its own copy of the model.

    Args:
        way: The way.
        model: The base model.
        tokenizer: Its tokenizer.
        row: Tokens of a row, and of its prompt.
        rows: Rows of a batch.
        layer: Where the vector is.
        folder: For what trainers write.
    """

    def __init__(
        self, way: Way, model: Any, tokenizer: Any, row: tuple[int, int], rows: int, layer: int, folder: str
    ) -> None:
        self.clock, batch = _Clock(), rows // 2 if way.kind == "dpo" else rows
        rows_of_data = data(tokenizer, way.kind, *row, batch * _EPOCH)
        prefix = FrozenPrefix() if way.frozen_prefix else False
        self.trainers = [
            _trainer(way, model, tokenizer, rows_of_data, batch, layer, folder, prefix) for _ in range(way.arms)
        ]
        self.trainers[0].add_callback(self.clock)

    def __call__(self, steps: int) -> list[float]:
        """Train; the seconds of every step, per arm."""
        self.clock.seconds.clear()
        for trainer in self.trainers:
            trainer.args.max_steps = steps
        if len(self.trainers) > 1:
            train_together(self.trainers)
        else:
            self.trainers[0].train()
        return [seconds / len(self.trainers) for seconds in self.clock.seconds]


def _trainer(
    way: Way, model: Any, tokenizer: Any, rows: Dataset, batch: int, layer: int, folder: str, prefix: Any
) -> Any:
    from trl import DPOConfig, SFTConfig

    pairs = way.kind == "dpo"
    trainer_class, config_class = (SteeringDPOTrainer, DPOConfig) if pairs else (SteeringSFTTrainer, SFTConfig)
    args = config_class(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=_STEPS,
        learning_rate=1e-4,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_length=None,
    )
    made = trainer_class(
        model=share_weights(model) if way.arms > 1 else copy.deepcopy(model),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=way.adapter(layer),
        loss=way.loss,
        frozen_prefix=prefix,
    )
    for callback in (PrinterCallback, ProgressCallback):
        made.remove_callback(callback)
    return made


class _Clock(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self._start)


def now() -> float:
    """Seconds: of a GPU's work, of this process with one thread on a CPU, else of the wall clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def data(tokenizer: Any, kind: str, length: int, prompt: int, count: int) -> Dataset:
    """Random words of one token each: prompts of `prompt` tokens, with an answer or two up to `length`, its end
    included."""
    generator = np.random.default_rng(0)
    known = (tokenizer.decode([i]) for i in range(200, 5000))
    words = [w for w in known if w.startswith(" ") and w[1:].isalpha() and w.isascii()]

    def text(tokens: int) -> str:
        return "".join(generator.choice(words, tokens))

    sides = ("chosen", "rejected") if kind == "dpo" else ("completion",)
    return Dataset.from_list(
        [{"prompt": text(prompt), **{side: text(length - prompt - 1) for side in sides}} for _ in range(count)]
    )


def floor(model: Any, way: Way, length: int, prompt: int, rows: int, layer: int) -> float:
    """Seconds of the bare matrix products: forward and backward of the layers above the vector, and of the head on the
    labelled tokens, at the rate this machine multiplies matrices of those shapes."""
    answers = rows * (length - prompt)
    prompts = 0 if way.adapter is _on_completions else rows // 2 if way.kind == "dpo" else rows
    tokens = answers + prompts * prompt
    blocks = model.get_decoder().layers[layer + 1 :]
    products = [(tokens, m.weight) for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    products.append((answers, model.get_output_embeddings().weight))
    total = 0.0
    for count, weight in {(count, weight.shape): (count, weight) for count, weight in products}.values():
        times = sum(1 for c, w in products if (c, w.shape) == (count, weight.shape))
        total += times * (_product(count, weight) + _product(count, weight.t().contiguous()))
    return total


@torch.no_grad()
def _product(rows: int, weight: torch.Tensor) -> float:
    states = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    seconds = []
    for _ in range(7):
        start = now()
        torch.nn.functional.linear(states, weight)
        seconds.append(now() - start)
    return median(seconds[2:])


def _memory_apart(options: Any, name: str, length: int, prompt: int) -> float:
    words = ["--memory-of", name, "--rows", f"{length}/{prompt}", "--tokens", str(options.tokens)]
    words += ["--model", options.model, *(["--threads", str(options.threads)] if options.threads else [])]
    command = [sys.executable, "-m", "steertune.recipes.benchmark", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def _memory(options: Any, name: str, length: int, prompt: int) -> float:
    model, tokenizer = load_model(ModelTable(name=options.model))
    layer, rows = 2 * model.config.num_hidden_layers // 3, max(2, options.tokens // length)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(WAYS[name], model, tokenizer, (length, prompt), rows, layer, folder)
        del model
        gc.collect()
        reset_peak_memory()
        run(2)
    return peak_memory_gb()


def page(options: Any, found: list[dict[str, Any]]) -> str:
    """The tables."""
    rows = " ".join(f"{at['length']}/{at['prompt']}" for at in found)
    ways = "" if options.ways == ["*"] else f" --ways {shlex.join(options.ways)}"
    command = (
        f"python -m steertune.recipes.benchmark --model {options.model} --rows {rows} --tokens {options.tokens} "
        f"--rounds {options.rounds} --threads {torch.get_num_threads()}{' --growth' if options.growth else ''}"
        f"{ways}{' --no-memory' if options.no_memory else ''}"
    )
    clock = "CPU seconds" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "seconds"
    lines = [
        "# What a training step costs",
        "",
        f"`{command}`: {torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds of "
        f"{_STEPS} timed steps a way, interleaved. Median {clock} of a step [smallest, largest]; ratios are of "
        f"medians. The first epoch is of {_EPOCH} steps, and holds the one-time comparison with the plain path. The "
        "floor is the matrix products above the vector and of the head on labels, at the rate of this machine, for "
        "the tokens that have to run.",
    ]
    for at in found:
        lines += [
            "",
            f"## {at['rows']} rows of {at['length']} tokens, {at['prompt']} of them prompt; vector on layer "
            f"{at['layer']}",
            "",
            "| | seconds a step | faster than TRL + LoRA | of the floor | first epoch, of that without memo "
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
        if "growth" in at:
            grown = ", ".join(f"{ratio:.1f} ({name})" for name, ratio in at["growth"].items())
            lines += ["", f"Ten times the rows, 20 against 2, take {grown} times the seconds."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
