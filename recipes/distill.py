"""Distil a prompt into an adapter, so that the model behaves as if it were there (Askell et al. 2112.00861).

    python -m steertune.recipes.distill vector_distillation
    python -m steertune.recipes.distill lora_distillation --views.good.text "Answer like a pirate."
    python -m steertune.recipes.distill vector_contrast_distillation      # demonstrations, each with a bad answer

The prompt is the arm's view `good`: an instruction, demonstrations, a contrast prompt. The prompted model answers the
training prompts; on these answers the arm learns its distributions (loss `context_distillation`) or its states
(`prompted`). On the prompted model's answers to test prompts,

    fidelity = 1 - KL(prompted ‖ distilled) / KL(prompted ‖ base)

is 1 if the adapter has the effect of the prompt, 0 if it is no closer to that than the base, and negative if it is
further away.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from steertune.adapters.description import write_description
from steertune.recipes.lab.arm import Arm, load_arm
from steertune.recipes.lab.checks import check_start
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import Data, load_data, load_model, model_has_template
from steertune.recipes.lab.descriptions import data_of, strength_of
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.files import ArmError, read_rows, write_rows
from steertune.recipes.lab.forms import notes_on_form, readable
from steertune.recipes.lab.generation import check_context, generate, prompt_lengths
from steertune.recipes.lab.ingredients.views import Views
from steertune.recipes.lab.observe import HeldOut, Observations, Prompted, behind, neutral_rows
from steertune.recipes.lab.options import ArmName, Threads
from steertune.recipes.lab.pages import Page, Section, Table, Text, in_terminal, prose, write_page
from steertune.recipes.lab.pages.measured import comparison, generations
from steertune.recipes.lab.pages.side_effects import side_effects
from steertune.recipes.lab.pair_lint import warn_of
from steertune.recipes.lab.progress import Bar, progress, track
from steertune.recipes.lab.rehearsal import rehearse, rehearse_training
from steertune.recipes.lab.rows import BASE, Record
from steertune.recipes.lab.training import claim, facts_of, held_out_of, open_run, train_and_save, training_of
from steertune.trainers import View, share_weights

_TEMPERATURE = 1.0
_TRAIN, _TEST = 0, 1  # seeds of the answers to training and test prompts


@command
def main(
    arm: ArmName = "vector_distillation", threads: Threads = None, overrides: Sequence[str] = ()
) -> Result | None:
    """Distil the arm's prompt and measure it; only the first of several processes returns the result."""
    with progress("Distillation"):
        record = run(load_arm(arm, overrides, recipe="distill"), threads)
    if not PartialState().is_main_process:
        return None
    return Result({**record.to_json(), "measures": record.means()}, "")


def run(arm: Arm, threads: int | None = None) -> Record:
    """Distil the arm's prompt and measure it, in the arm's output folder; return the content of `result.json`.

    Raises:
        ArmError: the arm has no prompt to distil or no adapter, the data have no prompts, or the folder holds
            something else.
        ViewError: demonstrations are test rows, or fewer than requested.
    """
    _check(arm)
    started = time.monotonic()
    folder, state = open_run(arm, "distill-", threads), PartialState()
    data = _load_prompts(arm)
    if state.is_main_process:
        print(data.note)
        warn_of(data.all_rows(), data.by, arm.data.name)
    answers = [name for name in ("chosen", "rejected") if name in data.train.column_names]
    check_start(_with_pool(arm, data.train), data.train.remove_columns(answers))
    model, tokenizer = load_model(arm.model)
    train, test = (readable(rows, tokenizer) for rows in (data.train, data.test))
    arm = _with_pool(arm, train)
    view = arm.get(Views).views()["good"].for_evaluation(train.to_list(), test.to_list())
    model.to(state.device)
    _rehearse(arm, model, tokenizer, test, view)

    # the prompted model's answers to training prompts are trained on, those to test prompts measure fidelity
    claim(folder, arm, state.is_main_process)
    bar = Bar(9)
    with bar.step("answers to training prompts", 2):
        examples = answered(arm, model, tokenizer, view, train, _TRAIN, folder / "answers.jsonl")
    with bar.step("answers to test prompts"):
        test_answers = answered(arm, model, tokenizer, view, test, _TEST, folder / "test_answers.jsonl")
    held_out = held_out_of(arm, model, tokenizer, test, prompted=Prompted(view, test_answers))

    notes = [*notes_on_form(data.train, tokenizer), *rehearse_training(arm, model, tokenizer, examples)]
    training = training_of(arm, share_weights(model), tokenizer, examples, folder, held_out=[test])
    training.notes |= {"rows": " ".join(notes)} if notes else {}
    with bar.step("training", 3):
        _, distilled, seconds = train_and_save(training, data)

    keys = {"task": Path(arm.data.name).name, "examples": len(train), "seed": arm.data.seed}
    prompted, record = (Record({"arm": name, **keys}) for name in (f"{arm.name}, prompted", arm.name))
    prompted.observations, record.observations = _measure(bar, held_out, view, distilled)
    record.facts = {
        **facts_of(training, held_out),
        "split": data.note,
        "train_prompts": len(examples),
        "unanswered": len(train) + len(test) - len(examples) - len(test_answers),
        "test_prompts": len(test_answers),
        "tokens": _tokens(tokenizer, view, test),
        "train_seconds": seconds,
        "seconds": time.monotonic() - started,
    }
    if state.is_main_process:
        write_description(folder / "adapter", strength_of(record), data_of(training.rows, arm.data.name))
        written = write_page(page(record, prompted), folder)
        prompted.write(folder / "prompted.json")
        record.write(folder / "result.json")  # written last, since it marks the run as finished
        print(f"\n{in_terminal(written)}\nThe page with answers: {written.with_suffix('.html')}, and {written}")
    return record


def _rehearse(arm: Arm, model: Any, tokenizer: Any, test: Dataset, view: View) -> None:
    """Try one row of everything, and refuse rows that are longer than the model's context with the prompt."""
    rehearse(held_out_of(arm, model, tokenizer, test))
    for rows, what in ((test, "test rows"), (neutral_rows(tokenizer), "neutral text")):
        check_context(model, tokenizer, behind(view, rows), 0, f"[views.good] of {what}")


def _measure(
    bar: Bar, held_out: HeldOut, view: View, distilled: Any
) -> tuple[dict[str, Observations], dict[str, Observations]]:
    """The observations of the prompted base and of the distilled model, each with those of the base."""
    with bar.step("base model"):
        base = evaluate_base(held_out)
    with bar.step("prompted model"):
        prompted = evaluate(held_out.model, held_out.behind(partial(behind, view)))
    with bar.step("distilled model"):
        return base | prompted, base | evaluate(distilled, held_out)


def _load_prompts(arm: Arm) -> Data:
    """The arm's rows, which must have prompts and held-out rows."""
    data = load_data(arm.data, partial(model_has_template, arm.model), answers=False)
    train, test = data.train, data.test
    if not len(test):
        raise ArmError(f"{data.note} Distillation is measured on held-out prompts. Give more rows.")
    if missing := [rows.column_names for rows in (train, test) if "prompt" not in rows.column_names]:
        raise ArmError(f"data.name={arm.data.name!r}: distillation answers prompts, but the rows have {missing[0]}.")
    if "" in [*train["prompt"], *test["prompt"]]:
        raise ArmError(
            f"data.name={arm.data.name!r}: distillation answers prompts, but some rows have an empty one. Give a "
            "column of prompts (`data.columns.prompt`)."
        )
    return data


def answered(
    arm: Arm, model: Any, tokenizer: Any, view: View, rows: Dataset, seed: int, file: Path | None = None
) -> Dataset:
    """Prompts with a sampled answer of the prompted model; processes share the work. Answers are saved in `file`, from
    which an interrupted run reads them.

    Raises:
        ArmError: the prompted model answers none of the prompts.
    """
    if file is not None and all(gather_object([file.exists()])):
        return Dataset.from_list(read_rows(file, "Delete it to answer the prompts again."))
    shown = [*behind(view, rows)["prompt"]]
    check_context(model, tokenizer, Dataset.from_dict({"prompt": shown}), arm.evaluation.new_tokens, "[views.good]")
    size, length = arm.evaluation.batch_size, arm.evaluation.new_tokens
    with PartialState().split_between_processes(list(range(0, len(shown), size))) as starts:
        mine: Any = [*starts]
        answers_by_start = {
            i: generate(model, tokenizer, shown[i : i + size], length, _TEMPERATURE, seed + 7 * i)
            for i in track(mine, "batch")
        }
    # merge by batch: with fewer batches than processes, several processes answer the last one
    everywhere = dict(gather_object(list(answers_by_start.items())))
    texts = [text for i in sorted(everywhere) for text in everywhere[i]]
    pairs = zip(rows["prompt"], texts, strict=True)
    answers = [{"prompt": prompt, "completion": _in_form(prompt, text)} for prompt, text in pairs if text]
    if not answers:
        raise ArmError("The prompted model gave no answer at all. Is [views.good] a prompt for this model?")
    if file is not None and PartialState().is_main_process:
        write_rows(file, answers)
    return Dataset.from_list(answers)


def _tokens(tokenizer: Any, view: View, test: Dataset) -> dict[str, float]:
    """Mean number of tokens of a request, without and with the prompt."""
    shown = [test["prompt"], behind(view, test)["prompt"]]
    plain, prompted = (sum(prompt_lengths(tokenizer, prompts)) / len(test) for prompts in shown)
    return {"plain": plain, "prompted": prompted, "saved": prompted - plain}


def page(record: Record, prompted: Record) -> Page:
    """The page, from the records of the distilled model and of the prompted base."""
    means, facts = record.means(), record.facts
    base, distilled = means[BASE], means["1"]
    table = comparison({"base": base, "prompted": prompted.means()["1"], "distilled": distilled}).frame
    plain, behind = (f"{facts['tokens'][name]:.0f}" for name in ("plain", "prompted"))
    unanswered = facts.get("unanswered", 0)
    nothing = f" The prompted model gave no answer to {unanswered} other prompts." if unanswered else ""
    table.loc[len(table)] = ["tokens of a request", plain, behind, plain]
    summary = Text(
        f"Fidelity **{distilled['fidelity']:.3f}** on {facts['test_prompts']} test prompts, after "
        f"{facts['train_prompts']} training prompts; **{facts['tokens']['saved']:.0f} tokens saved** per request."
        f"{nothing}"
    )
    models = {"base": record.seen(), "prompted": prompted.seen(1), "distilled": record.seen(1)}
    answers = generations(
        facts["prompts"], {name: [*one["answer"]] for name, one in models.items() if "answer" in one}
    )
    notes = [prose(facts["split"]), *facts["notes"].values()]
    sections = [
        Section("", [summary, *map(Text, notes)]),
        Section(
            "Effect and side effects",
            [*side_effects(models, "model"), Text("Every measure:"), Table(table, "measures")],
        ),
        *([Section("Generations (greedy)", answers)] if answers else []),
    ]
    return Page(f"{record.keys['arm']}: a prompt, distilled", sections)


def _check(arm: Arm) -> None:
    loss = arm.loss_object()
    if loss is None or {*loss.needs.views} - {"neutral"} != {"good"} or loss.needs.pairs:
        raise ArmError(
            f"loss.name={arm.loss.get('name')!r} does not learn from a prompt. Use context_distillation or prompted."
        )
    if arm.get(Views).tables.get("good", {}).get("name") not in ("instruction", "demonstrations"):
        raise ArmError('[views.good] is the prompt: its name must be "instruction" or "demonstrations".')
    if arm.peft_config() is None or arm.trainer.get("max_steps") == 0:
        raise ArmError('Distillation trains an adapter (got adapter.type="none" or trainer.max_steps=0).')


def _with_pool(arm: Arm, train: Dataset) -> Arm:
    """The arm with the training examples as the pool of its demonstrations, for test prompts too."""
    tables = arm.get(Views).tables
    if tables["good"]["name"] != "demonstrations":
        return arm
    views = Views(**{**tables, "good": {**tables["good"], "pool": tuple(train.to_list())}})
    return arm.model_copy(update={"ingredients": {**arm.ingredients, "views": views}})


def _in_form(prompt: Any, text: str) -> Any:
    """An answer in the form of its prompt, text or messages."""
    if isinstance(prompt, str):
        return text if prompt[-1:].isspace() else f" {text}"
    return [{"role": "assistant", "content": text}]


if __name__ == "__main__":
    sys.exit(main())
