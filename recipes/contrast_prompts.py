"""Train a model to respond to contrast prompts, and measure it on unseen tasks.

    python -m steertune.recipes.contrast_prompts embedded --folder runs/contrast_prompts
    python -m steertune.recipes.contrast_prompts wide --data-root DATA --steering vector_dpo lora_dpo

A contrast prompt shows pairs of the task ("Good response: ... Bad response: ..."), then asks for a good response. The
file lists the tasks: contrast prompts are made from the `seen` tasks, and an adapter (`arm`) is trained on them once;
the `unseen` tasks have other data. For each unseen task and every draw of a few pairs, held-out pairs are measured

- without a prompt, after the pairs' good answers (k-shot), and after the contrast prompt;
- with the base model, and with the model that was trained on contrast prompts;
- and, without a prompt, with every `steering` arm, trained on these few pairs.

To see whether the training worked at all, held-out pairs of the seen tasks are measured without a prompt and after
contrast prompts made from the training pairs, with the base model and the trained one. If the model does not respond
there, unseen tasks cannot show whether a response transfers. If a task is listed twice, once with `reverse = true`,
a model can be right on both only by reading the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from pydantic import BaseModel, Field, ValidationError
from transformers import set_seed
from trl import DPOConfig

from steertune.adapters.description import write_description
from steertune.adapters.saved import check_checksums, write_checksums
from steertune.recipes.ablation.checks import check_draws
from steertune.recipes.ablation.contrast_page import page
from steertune.recipes.ablation.grid import find_tasks
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab import measures, trained_on
from steertune.recipes.lab.arm import Arm, check_tables, load_arm
from steertune.recipes.lab.checks import check_adapters, check_training, check_trains
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model, model_has_template
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.files import ArmError, read_result, read_toml, reasons, write_result
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.generation import check_context
from steertune.recipes.lab.observe import HeldOut, behind, neutral_rows
from steertune.recipes.lab.options import Argument, Option, Threads
from steertune.recipes.lab.pages import write_page
from steertune.recipes.lab.pair_lint import warn_of
from steertune.recipes.lab.paths import CONFIGS
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import Bar, progress, track
from steertune.recipes.lab.rehearsal import rehearse, rehearse_training
from steertune.recipes.lab.rows import Record
from steertune.recipes.lab.secrets import check_settings
from steertune.recipes.lab.sources import Reading
from steertune.recipes.lab.splits import SplitTable, load_splits
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.lab.trained_on import TrainedOn
from steertune.recipes.lab.training import check_folder, claim, fit, make_trainer, training_of
from steertune.trainers import get_view, share_weights

MIXTURES = CONFIGS / "mixtures"
_PROMPTS = ("plain", "k-shot", "contrast")
_CHECKED = ("plain", "contrast")  # on seen tasks
_BATCH = 4
_ANSWERS, _TOKENS = 8, 24  # to neutral prompts, for the repetition


class MixtureTables(BaseModel, extra="forbid", strict=True):
    """The tables of the file."""

    seen: list[str | TaskTable] = Field(min_length=1)
    unseen: list[str | TaskTable] = Field(min_length=1)
    arm: str = "lora_dpo"
    """The arm that is trained on contrast prompts: a file, or a name in `recipes/configs/arms/`. Its task is
    ignored."""
    adapter: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    trainer: dict[str, Any] = {"max_steps": 48, "save_steps": 16, "save_total_limit": 2}
    """Tables that override those of the arm."""
    steering: list[str] = ["vector_dpo"]
    model: ModelTable = ModelTable()
    demonstrations: int = Field(default=4, ge=1)
    """Number of pairs in a prompt."""
    examples: int = Field(default=48, ge=2)
    """Number of contrast prompts for every seen task."""
    pairs: int = Field(default=4, ge=2)
    """Number of pairs of an unseen task: demonstrations are drawn from them and steering arms are trained on them. If
    it equals `demonstrations`, both use the same pairs."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0, 1, 2], min_length=1)
    splits: SplitTable = SplitTable(validation=2, scorer=0, test=24)


@command
def main(
    file: Annotated[str, Argument(help="a .toml file, or a name in recipes/configs/mixtures/")] = "embedded",
    data_root: Annotated[Path | None, Option(help="folder that relative task names refer to")] = None,
    steering: Annotated[
        list[str] | None, Option(help="arms that learn from the same pairs, instead of the file's", metavar="ARM ...")
    ] = None,
    threads: Threads = None,
    folder: Annotated[Path, Option(help="folder of the study")] = Path("runs/contrast_prompts"),
) -> Result | None:
    """Run the study, and print its page; only the first of several processes returns the result."""
    begin(threads)
    tables = read(file)
    if steering:
        tables = tables.model_copy(update={"steering": steering})
    with progress("Study"):
        page = Mixture(tables, data_root).run(folder)
    if not PartialState().is_main_process:
        return None
    result = read_result(folder / "result.json", "Run the study again.")
    return Result(result, f"\n{page.read_text(encoding='utf-8')}\nThis page: {page}")


def read(file: str) -> MixtureTables:
    """The tables of a file, or of a name in `recipes/configs/mixtures/`.

    Raises:
        ArmError: no such file, broken TOML, an unknown key or a value of the wrong type.
    """
    path = Path(file) if Path(file).suffix == ".toml" else MIXTURES / f"{file}.toml"
    if not path.is_file():
        raise ArmError(f"No file {file!r}. Names: {sorted(p.stem for p in MIXTURES.glob('*.toml'))}.")
    raw = read_toml(path)
    check_tables("mixture", raw, MixtureTables)
    check_settings(raw)
    try:
        return MixtureTables(**raw)
    except ValidationError as error:
        raise ArmError(reasons(error)) from error


class Mixture:
    """One study; its tasks and arms are checked when it is created. Task names that are relative paths refer to
    `data_root`.

    Raises:
        ArmError: an unseen task has the data or the label of a seen one, there are too few rows or pairs, or an arm
            does not fit.
    """

    def __init__(self, tables: MixtureTables, data_root: Path | None = None) -> None:
        self.tables = tables
        self.seen, self.unseen = (find_tasks(entries, data_root) for entries in (tables.seen, tables.unseen))
        if both := {task.name for task in self.seen} & {task.name for task in self.unseen}:
            raise ArmError(f"{sorted(both)} are data of both seen and unseen tasks. Give the unseen tasks other data.")
        find_tasks([*self.seen, *self.unseen])  # labels must differ
        check_draws(self.unseen)
        if tables.pairs < tables.demonstrations:
            raise ArmError(
                f"pairs={tables.pairs} of an unseen task must not be fewer than the {tables.demonstrations} "
                "demonstrations in a prompt."
            )
        if tables.examples <= tables.demonstrations:
            raise ArmError(
                f"examples={tables.examples} of a seen task must be more than the {tables.demonstrations} "
                "demonstrations in a prompt, since no prompt demonstrates itself."
            )
        self.arm = self._trained_arm()
        self.steering = [self._arm(name) for name in tables.steering]
        chat = cache(partial(model_has_template, tables.model))
        self.splits = {}
        for tasks, rows in ((self.seen, tables.examples), (self.unseen, tables.pairs)):
            for task in tasks:
                reading = Reading(task.columns, task.format, chat)
                self.splits[task.label] = load_splits(task.name, tables.splits, rows, task.reverse, reading)

    def _arm(self, name: str) -> Arm:
        arm = load_arm(name, recipe="contrast_prompts")
        if arm.data.pairing != "own":
            raise ArmError(
                f"Arm {name!r}: data.pairing must be 'own' (got {arm.data.pairing!r}), as all arms share pairs."
            )
        return arm

    def _trained_arm(self) -> Arm:
        arm, tables = self._arm(self.tables.arm), self.tables
        parts = {part: {**getattr(arm, part), **getattr(tables, part)} for part in ("adapter", "loss", "trainer")}
        arm = arm.model_copy(update=parts)
        if arm.peft_config() is None:
            raise ArmError(
                f"Arm {tables.arm!r} changes the base model, with which it is compared. Choose an arm with an adapter."
            )
        arm.loss_object()
        return arm

    def run(self, folder: Path) -> Path:
        """Train once, measure every task, write the page; an interrupted run continues where it stopped."""
        main_process = PartialState().is_main_process
        check_folder(folder, self.tables)
        arms = [self.arm, *self.steering]
        for arm in arms:
            check_training(arm, DPOConfig)
            check_trains(arm)
        check_adapters([arm.model_copy(update={"model": self.tables.model}) for arm in arms])
        model, tokenizer = load_model(self.tables.model)
        model.to(PartialState().device)
        in_form = partial(readable, tokenizer=tokenizer)
        self.splits = {label: splits.each(in_form) for label, splits in self.splits.items()}
        self._rehearse(model, tokenizer)
        for label, splits in self.splits.items() if main_process else ():
            warn_of(splits.pool, splits.by, label)
        claim(folder, self.tables, main_process)
        # an unseen task takes about as long as three seen ones, since the steering arms are trained on it
        bar = Bar(4 + len(self.seen) + 3 * len(self.unseen))
        with bar.step("training", 3):
            trained = self._trained(model, tokenizer, folder)
        models = {"base": model, "trained": trained}
        with bar.step("seen tasks", len(self.seen)):
            seen = [*self._records(self.seen, _CHECKED, models, tokenizer, folder / "seen")]
        with bar.step("unseen tasks", 3 * len(self.unseen)):
            unseen = [*self._records(self.unseen, _PROMPTS, models, tokenizer, folder / "cells", self.steering)]
        with bar.step("neutral text"):
            effects = self._side_effects(models, tokenizer)
        if main_process:
            tasks = self.seen + self.unseen
            write_page(page(self._about(), self.tables.steering, tasks, seen, unseen, effects), folder)
            result = {"seen": [record.to_json() for record in seen], "cells": [record.to_json() for record in unseen]}
            # written last, since it marks the run as finished
            write_result(folder / "result.json", result | {"side_effects": effects.to_json()})
        return folder / "page.md"

    def _about(self) -> str:
        tables, seen = self.tables, ", ".join(task.label for task in self.seen)
        divided = "".join(f" {splits.note}" for splits in self.splits.values() if splits.note)
        return (
            f"Arm `{tables.arm}` on {tables.examples} contrast prompts of each of {seen}; unseen tasks with "
            f"{tables.pairs} pairs each, {tables.demonstrations} in a prompt, {len(tables.seeds)} draws.{divided}"
        )

    def contrast_prompts(self) -> Dataset:
        """Pairs of all seen tasks after contrast prompts made from other pairs of the same task."""
        parts = []
        for task in self.seen:
            rows = self._trained_rows(task)
            view = get_view("demonstrations", k=self.tables.demonstrations, contrast=True, pool=tuple(rows.to_list()))
            parts.append(behind(view, rows))
        return concatenate_datasets(parts).shuffle(seed=0)

    def _shown(self, task: TaskTable, seed: int, prompt: str) -> Dataset:
        """A task's test pairs, plain or after other pairs (for a seen task, its training pairs)."""
        splits, tables = self.splits[task.label], self.tables
        if prompt == "plain":
            return splits.test
        is_seen = task in self.seen
        pool = self._trained_rows(task) if is_seen else self._pairs(task, seed)
        # different tasks, such as one and its reverse, show different rows
        number = seed * len(self.seen) + self.seen.index(task) if is_seen else seed
        options = {"k": tables.demonstrations, "seed": number, "pool": tuple(pool.to_list())}
        view = get_view("demonstrations", contrast=prompt == "contrast", **options)
        return behind(view, splits.test)

    def _trained_rows(self, task: TaskTable) -> Dataset:
        """The rows of a seen task from which contrast prompts are made."""
        return self.splits[task.label].train(self.tables.examples, 0, draw=task.draw)

    def _pairs(self, task: TaskTable, seed: int) -> Dataset:
        """The pairs of an unseen task."""
        return self.splits[task.label].train(self.tables.pairs, seed, draw=task.draw)

    def _rehearse(self, model: Any, tokenizer: Any) -> None:
        """Try one row of everything, and refuse prompts that are longer than the model's context."""
        for task in self.seen + self.unseen:
            rehearse(HeldOut(model, tokenizer, self.splits[task.label].test, neutral_rows(tokenizer)))
        for arm, rows in product(self.steering, (self._pairs(task, self.tables.seeds[0]) for task in self.unseen)):
            rehearse_training(arm, model, tokenizer, rows)
        rehearse_training(self.arm, model, tokenizer, self.contrast_prompts())
        check_context(model, tokenizer, self.contrast_prompts(), 0, "Contrast prompts of seen tasks")
        for tasks, prompts in ((self.seen, _CHECKED), (self.unseen, _PROMPTS)):
            for task, seed, prompt in product(tasks, self.tables.seeds, prompts):
                rows = self._shown(task, seed, prompt)
                check_context(model, tokenizer, rows, 0, f"Task {task.label!r}, {prompt} prompts")

    def _trained(self, model: Any, tokenizer: Any, folder: Path) -> Any:
        home = folder / "adapter"
        if home.is_dir():
            try:
                check_checksums(home)
            except ValueError as error:
                raise ArmError(f"{error}. Delete {home} to train it again.") from error
            return PeftModel.from_pretrained(share_weights(model), str(home)).eval()
        set_seed(0)
        trainer = make_trainer(training_of(self.arm, share_weights(model), tokenizer, self.contrast_prompts(), folder))
        fit(trainer, folder)
        trainer.save_model(str(folder / "adapter.part"))
        if PartialState().is_main_process:
            parts = [(self._trained_rows(task), self.splits[task.label]) for task in self.seen]
            trained_on.write(folder / "adapter.part", [TrainedOn.of(rows, splits.by) for rows, splits in parts])
            write_description(folder / "adapter.part")
            write_checksums(folder / "adapter.part")
            (folder / "adapter.part").rename(home)
        return trainer.accelerator.unwrap_model(trainer.model).eval()

    def _held_out(self, model: Any, tokenizer: Any, pairs: Dataset) -> HeldOut:
        """Pairs, together with neutral text whose prompts are answered."""
        answers: dict[str, Any] = {"neutral_generations": _ANSWERS, "new_tokens": _TOKENS, "batch_size": _BATCH}
        return HeldOut(model, tokenizer, pairs, neutral_rows(tokenizer), **answers)

    def _records(
        self,
        tasks: Sequence[TaskTable],
        prompts: Sequence[str],
        models: Mapping[str, Any],
        tokenizer: Any,
        folder: Path,
        steering: Sequence[Arm] = (),
    ) -> Iterator[Record]:
        """A record for every task, seed and condition: a model with a prompt, or a steering arm without one."""
        for task, seed in track([*product(tasks, self.tables.seeds)], "task"):
            held_out = self._held_out(models["base"], tokenizer, self.splits[task.label].test)
            home = folder / task.label / f"seed{seed}"
            for prompt, (name, model) in product(prompts, models.items()):
                shown = held_out.behind(lambda _, t=task, s=seed, p=prompt: self._shown(t, s, p))
                yield self._record(home, f"{name}, {prompt}", task, seed, shown, lambda model=model: model)
            for arm in steering:
                make = partial(self._steered, arm, task, seed, models["base"], tokenizer, home / arm.name)
                yield self._record(home, arm.name, task, seed, held_out, make, ["neutral"])

    def _record(
        self,
        home: Path,
        condition: str,
        task: TaskTable,
        seed: int,
        held_out: HeldOut,
        model: Callable[[], Any],
        neutral: Sequence[str] = (),
    ) -> Record:
        """A condition's record, from its file if there is one; otherwise it is measured, also on `neutral` text."""
        file = home / f"{condition.replace(', ', '-')}.json"
        if not file.exists():
            examples = self.tables.examples if task in self.seen else self.tables.pairs
            record = Record({"arm": condition, "task": task.label, "examples": examples, "seed": seed})
            names = [*measures.served_by("pairs", *neutral), *(["neutral_repetition"] if neutral else [])]
            record.observations = evaluate_base(held_out, names) | evaluate(model(), held_out, names)
            file.parent.mkdir(parents=True, exist_ok=True)
            record.write(file)
        return Record.read(file)

    def _steered(self, arm: Arm, task: TaskTable, seed: int, base: Any, tokenizer: Any, home: Path) -> Any:
        """A steering arm's model, trained on the pairs of an unseen task."""
        arm = arm.model_copy(update={"data": arm.data.model_copy(update={"seed": seed})})
        training = training_of(arm, share_weights(base), tokenizer, self._pairs(task, seed), home)
        trainer = make_trainer(training, save_strategy="no", disable_tqdm=True)
        fit(trainer, home)
        return trainer.accelerator.unwrap_model(trainer.model).eval()

    def _side_effects(self, models: Mapping[str, Any], tokenizer: Any) -> Record:
        """The effect of the trained model on neutral text, without a prompt."""
        names = [*measures.served_by("neutral"), "neutral_repetition"]
        held_out = self._held_out(models["base"], tokenizer, neutral_rows(tokenizer))
        keys = {"arm": "trained", "task": "neutral", "examples": self.tables.examples, "seed": 0}
        return Record(keys, evaluate_base(held_out, names) | evaluate(models["trained"], held_out, names))


if __name__ == "__main__":
    sys.exit(main())
