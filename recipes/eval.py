"""Run lm-eval benchmarks at several strengths of a steering vector.

    steertune eval my-vector --tasks arc_easy hellaswag --limit 200
    steertune eval my-vector --tasks my_task.yaml cautious_advice my_pairs.jsonl --strengths 0 1 2 --json

A task is the name of an lm-eval task, your own task file (.yaml), an embedded task, or a file of pairs; for the last
two, the test split becomes a choice between the two answers. A task file can name code (`!function`), and its
templates can reach all of Python: the first is refused and the second run in a sandbox, unless --run-task-code
allows both. Strength 0 is the base model, measured on the same rows with the same code. Standard errors are
lm-eval's. Needs lm-eval: pip install "steertune[eval]".
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from datasets import Dataset
from peft import PeftModel

from steertune.adapters import steering_layers
from steertune.recipes.lab import embedded
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import base_of, load_steered, model_has_template
from steertune.recipes.lab.files import ArmError, nearest, write_whole
from steertune.recipes.lab.forms import readable, written
from steertune.recipes.lab.generation import check_context, check_finite, check_strength
from steertune.recipes.lab.held_out import held_out_rows
from steertune.recipes.lab.options import (
    Argument,
    Base,
    ColumnNames,
    Count,
    Device,
    DType,
    Option,
    Threads,
    columns_of,
)
from steertune.recipes.lab.pair_lint import warn_of
from steertune.recipes.lab.processes import begin, device_of
from steertune.recipes.lab.progress import progress, track
from steertune.recipes.lab.reading import BUILDERS
from steertune.recipes.lab.similarity import told_apart_by
from steertune.recipes.lab.sources import Reading
from steertune.recipes.lab.task_files import SUFFIXES, check_task_file, check_task_folder, sandboxed
from steertune.trainers import scaled

_BATCH = 8
STRENGTHS = [0.0, 1.0]


@command
def main(
    folder: Annotated[Path, Argument(help="adapter folder")],
    tasks: Annotated[list[str], Option(help="see above", metavar="TASK ...")],
    strengths: Annotated[list[float], Option(help="strengths of the vector", metavar="NUMBER ...")] = STRENGTHS,
    columns: ColumnNames = None,
    include: Annotated[Path | None, Option(help="a folder with more task files for lm-eval")] = None,
    model: Base = None,
    dtype: DType = "float32",
    device: Device = None,
    limit: Annotated[int | None, Count("use only the first rows of every task (all)")] = None,
    fewshot: Annotated[int | None, Option(help="demonstrations in front of every question (the task's own)")] = None,
    chat: Annotated[bool, Option("--chat", help="format lm-eval's own tasks with the chat template")] = False,
    batch: Annotated[int, Count("rows at a time")] = _BATCH,
    output: Annotated[Path | None, Option(help="also write the numbers to this JSON file")] = None,
    run_task_code: Annotated[
        bool, Option("--run-task-code", help="run code from task files, with all your permissions")
    ] = False,
    threads: Threads = None,
) -> Result:
    """Run lm-eval at every strength."""
    check_installed()
    check_request(tasks, strengths, fewshot, include, output)
    check_options_of_pairs(tasks, fewshot, chat, columns)
    if not run_task_code:
        check_task_files(tasks, include)
    begin(threads, only_one=True)
    where = device_of(device)
    # read data before loading the model; rows that the adapter was trained on are refused
    reading = Reading(columns_of(columns), chat=partial(model_has_template, base_of(folder, model)))
    pairs = {}
    for name in filter(is_pairs, tasks):
        pairs[name], note = held_out_rows(name, [folder], reading)
        check_pairs(name, pairs[name])
        print(f"{name}: {len(pairs[name])} rows. {note}".strip(), file=sys.stderr)
        warn_of(pairs[name], told_apart_by(pairs[name].to_list()), name)
    steered, tokenizer, _ = load_steered(folder, model, dtype)
    steered = steered.to(where)
    settings = {"num_fewshot": fewshot, "limit": limit, "apply_chat_template": chat}
    with progress("Benchmarks"), nullcontext() if run_task_code else sandboxed():
        metrics = evaluate(steered, tokenizer, tasks, strengths, include, batch, pairs, **settings)
    if output is not None:
        write_whole(output, json.dumps(metrics, indent=1))
    return Result(metrics, table(metrics))


def check_request(
    tasks: Sequence[str], strengths: Sequence[float], fewshot: int | None, include: Path | None, output: Path | None
) -> None:
    """Refuse impossible options before the model is loaded.

    Raises:
        ArmError: the message names the option.
    """
    if not tasks or not all(tasks):
        raise ArmError("--tasks must name one task or more.")
    if repeated := sorted({name for name in tasks if tasks.count(name) > 1}):
        raise ArmError(f"--tasks names {repeated[0]!r} twice. Name it once.")
    if bad := [strength for strength in strengths if not math.isfinite(strength)]:
        raise ArmError(f"--strengths {bad[0]} must be a finite number.")
    if len(set(strengths)) < len(strengths) or not strengths:
        raise ArmError(f"--strengths {[*strengths]} must be one or more numbers, each once.")
    if fewshot is not None and not 0 <= fewshot < 2**31:
        raise ArmError(f"--fewshot {fewshot} must be a whole number of 0 or more.")
    if include is not None and not include.is_dir():
        raise ArmError(f"--include {include} must be a folder that exists.")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ArmError(f"--output {output} must be a file in a folder that exists.")


def check_options_of_pairs(
    tasks: Sequence[str], fewshot: int | None, chat: bool, columns: Sequence[str] | None
) -> None:
    """Refuse options that do not apply to pairs, which are formatted as in training, or that only apply to pairs.

    Raises:
        ArmError: the message names the option.
    """
    pairs = [name for name in tasks if is_pairs(name)]
    if pairs and (chat or fewshot):
        option = "--chat" if chat else f"--fewshot {fewshot}"
        raise ArmError(
            f"{option} is for lm-eval's own tasks, but {pairs[0]} holds pairs, which are formatted as in training. "
            "Leave it out, or evaluate the pairs in a separate run."
        )
    if columns and not pairs:
        raise ArmError(f"--columns names the columns of pairs, but --tasks {' '.join(tasks)} has none. Leave it out.")


def check_task_files(tasks: Sequence[str], include: Path | None) -> None:
    """Refuse task files that name code, also those of `include`.

    Raises:
        ArmError: see `check_task_file`.
    """
    for name in tasks:
        if Path(name).suffix in SUFFIXES and Path(name).is_file():
            check_task_file(Path(name))
    if include is not None:
        check_task_folder(include)


def check_installed() -> None:
    """Raise an ArmError if lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ArmError('lm-eval is not installed: pip install "steertune[eval]", or pip install lm-eval.')


def evaluate(
    model: PeftModel,
    tokenizer: Any,
    tasks: Sequence[str],
    strengths: Sequence[float] = (0.0, 1.0),
    include: Path | None = None,
    batch_size: int = _BATCH,
    pairs: Mapping[str, Dataset] | None = None,
    **settings: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """lm-eval's metrics at each strength. `pairs` are test rows that were read before; `settings` are arguments of
    `lm_eval.simple_evaluate`.

    Returns:
        Strength (as a string) -> task -> metric -> value; `acc_stderr,none` is the standard error of `acc,none`.

    Raises:
        ArmError: an unknown task, or an adapter that steers by position: lm-eval does not say where prompts end.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    positions = {c.positions for layer in steering_layers(model) for c in layer.config.values()} - {"all"}
    if positions:
        raise ArmError(
            f"positions={sorted(positions)}: lm-eval's forward passes do not tell where a prompt ends, so such an "
            "adapter does not know which tokens to steer. Train one with positions='all'."
        )
    for strength in strengths:
        check_strength(model, strength)
    manager, tasks_to_run = _tasks(tasks, model, tokenizer, include, pairs or {})
    wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # pyright: ignore
    run_tasks: Any = simple_evaluate
    metrics = {}
    for strength in track(strengths, "strength"):
        with scaled(model, strength), finite_logits(model):
            results: Any = run_tasks(wrapped, tasks=tasks_to_run, task_manager=manager, log_samples=False, **settings)
        # only the metrics of lm-eval's row, without standard errors that it could not compute
        metrics[f"{strength:g}"] = {
            task: {name: float(v) for name, v in row.items() if "," in name and isinstance(v, int | float)}
            for task, row in results["results"].items()
        }
    return metrics


@contextmanager
def finite_logits(model: PeftModel) -> Iterator[None]:
    """Context in which NaN or infinite logits are errors; lm-eval would score them.

    Raises:
        NonFiniteError: raised in the forward pass.
    """

    def check(module: Any, args: Any, output: Any) -> None:
        check_finite(output.logits.flatten(0, -2))

    handle = model.get_base_model().register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _tasks(
    names: Sequence[str], model: Any, tokenizer: Any, include: Path | None, pairs: Mapping[str, Dataset]
) -> tuple[Any, list[Any]]:
    """lm-eval's task manager, and the tasks to run with it."""
    from lm_eval.tasks import TaskManager

    tasks: list[Any] = []
    indexed = []  # without the built-in tasks, whose index takes seconds to read
    for name in names:
        suffix = Path(name).suffix
        if is_pairs(name):
            tasks.append(pair_task(name, model, tokenizer, pairs.get(name)))
        elif suffix in SUFFIXES:
            if not Path(name).is_file():
                raise ArmError(f"--tasks {name} does not exist. Correct the path.")
            tasks.append(name)
        else:
            tasks.append(name)
            indexed.append(name)
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=bool(indexed))
    for name in indexed:
        if name not in manager.all_tasks:
            names_of_tasks = [*manager.all_tasks, *embedded.task_names()]
            raise ArmError(f"--tasks {name!r}: lm-eval has no such task.{nearest(name, names_of_tasks)}")
    return manager, tasks


def is_pairs(name: str) -> bool:
    """Whether a task is an embedded one, or a file or folder of pairs."""
    return name in embedded.task_names() or Path(name).suffix in BUILDERS or Path(name).is_dir()


def check_pairs(name: str, rows: Dataset) -> None:
    """Raise an ArmError for rows that are not pairs with a prompt."""
    if missing := {"prompt", "chosen", "rejected"} - set(rows.column_names):
        raise ArmError(
            f"--tasks {name}: pairs need the columns prompt, chosen and rejected; {sorted(missing)} missing."
        )


def pair_task(name: str, model: Any, tokenizer: Any, rows: Dataset | None = None) -> dict[str, Any]:
    """The test split of pairs as a task for lm-eval: which answer is likelier, `acc`, or likelier for its length,
    `acc_norm`. Messages are formatted with the chat template, or as plain text if there is none. `rows` are test rows
    that were read before.

    Raises:
        ArmError: no such data, no pairs with a prompt, or rows that are longer than the model's context.
    """
    if rows is None:
        rows, _ = held_out_rows(name, [])
    check_pairs(name, rows)
    rows = readable(rows, tokenizer)
    check_context(model, tokenizer, rows, 0, f"--tasks {name}", "Remove such rows, or choose a model that reads more.")
    answers = {
        column: [answer if isinstance(answer, str) else answer[-1]["content"] for answer in rows[column]]
        for column in ("chosen", "rejected")
    }
    rows = Dataset.from_dict({"text": [written(tokenizer, prompt) for prompt in rows["prompt"]], **answers})
    return {
        "task": Path(name).stem,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{[chosen, rejected]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }


def table(metrics_at: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A line for every metric of every task, a column for every strength."""
    strengths = list(metrics_at)
    lines = [["task", "metric", *(f"strength {s}" for s in strengths)]]
    first = metrics_at[strengths[0]]
    for task, metrics in first.items():
        for metric in metrics:
            name, _, rest = metric.partition(",")
            if name.endswith("_stderr"):
                continue
            cells = []
            for strength in strengths:
                row = metrics_at[strength][task]
                error = row.get(f"{name}_stderr,{rest}")
                cells.append(f"{row[metric]:.4g}" + ("" if error is None else f" ± {error:.2g}"))
            lines.append([task, name if rest in ("", "none") else metric, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
