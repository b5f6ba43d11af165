"""What a new user types wrong, and what a hostile one sends: settings, secrets, code in data, names and numbers.

All of it is refused before a model is loaded, and leaves no file behind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_data
from bad_inputs import Lab, Row, run
from bad_inputs_commands import command, on
from datasets import Dataset
from peft import get_peft_model
from tiny_models import tiny
from trl import DPOConfig, SFTConfig

from steertune.adapters import SteeringVectorConfig
from steertune.losses import get_loss
from steertune.recipes import cli
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.eval import check_request, check_task_files
from steertune.recipes.lab.arm import load_arm, make_arm
from steertune.recipes.lab.checks import check_adapters, check_training, check_trains
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import check_name, read_toml
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.lab.training import check_folder
from steertune.recipes.serving.line_service import answered
from steertune.trainers.row_checks import TokenLimits, check_rows, check_tokenised

HUGE = 10**400
TOKEN = "hf_" + "a1B2" * 9


def arm(says: str, **tables: Any) -> Row:
    """An arm that is refused as it is read."""
    good = {"name": "mine", "data": {"name": "cautious_advice"}}
    return (lambda lab: make_arm({**good, **tables})), says


def words(says: str, *overrides: str) -> Row:
    return (lambda lab: load_arm("vector_dpo", overrides)), says


def shaped(says: str, arm_name: str = "vector_dpo", **tables: Any) -> Row:
    """An arm that the shape of its model contradicts, which is known without the weights."""

    def call(lab: Lab) -> Any:
        made = load_arm(arm_name)
        weights = lab.here / "model" / "config.json"
        weights.parent.mkdir()
        weights.write_text((lab.root / "model" / "config.json").read_text())  # a folder without weights
        model = ModelTable(name=str(weights.parent))
        dumped = made.model_dump()
        return check_adapters([make_arm({**dumped, **tables, "model": model.model_dump()})])

    return call, says


def training(says: str, kind: type = DPOConfig, **trainer: Any) -> Row:
    """Training arguments that can be read and not made."""

    def call(lab: Lab) -> Any:
        made = make_arm({"name": "mine", "data": {"name": "cautious_advice"}, "trainer": trainer})
        check_training(made, kind)
        return check_trains(made)

    return call, says


def grid(says: str, **tables: Any) -> Row:
    return (lambda lab: make_grid({**lab.tables(), **tables})), says


def train(says: str, *options: str) -> Row:
    """The whole command; it leaves no folder, so that the corrected one can have it."""

    def call(lab: Lab) -> Any:
        data = [f"--data.name={lab.root}/task", "--data.train=4", "--data.test=2", "--output.folder=o"]
        try:
            return run(cli.main, ["train", "vector_dpo", f"--model.name={lab.root}/model", *data, *options])
        finally:
            assert not list(lab.here.glob("o*"))

    return call, says


def file(says: str, name: str, text: str | bytes, call: Callable[[Path], Any]) -> Row:
    return (lambda lab: call(lab.file(name, text))), says


def task(says: str, text: str | bytes, **others: str) -> Row:
    """A task file for lm-eval."""

    def call(lab: Lab) -> Any:
        for name, content in others.items():
            lab.file(f"{name}.yaml", content)
        return check_task_files([str(lab.file("task.yaml", text))], None)

    return call, says


def rows(says: str, **columns: Any) -> Row:
    """A row of messages with further columns."""
    row = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sits"}], **columns}
    return (lambda lab: check_rows(Dataset.from_list([row]), tiny_data.tokenizer())), says


def tokens(says: str, row: dict[str, Any]) -> Row:
    return (lambda lab: check_tokenised(None, Dataset.from_list([row]), TokenLimits(vocabulary=64))), says


def served(says: str, *options: str) -> Row:
    return command(says, "serve", *options)


def unfinished(lab: Lab) -> Any:
    """Another arm's run that got as far as a checkpoint."""
    lab.file("o/config.json", "{}")
    lab.file("o/checkpoints/checkpoint-2/trainer_state.json", "{}")
    return check_folder(Path("o"), load_arm("vector_dpo"))


def remote(lab: Lab, **config: Any) -> Any:
    lab.file("model/config.json", json.dumps(config))
    lab.file("model/evil.py", "raise SystemExit('sprung')")
    return load_model(ModelTable(name="model"))


def revision(text: str) -> Row:
    return arm("revision", model={"name": "org/model", "revision": text})


def adapter_name(name: str) -> Row:
    return (
        lambda lab: get_peft_model(tiny(), SteeringVectorConfig(), adapter_name=name)
    ), "cannot be the name of an adapter"


STRICT = "Input should be a valid"
RANGE = "makes no sense. It must be"
NAME = "cannot name a folder"
CODE = "runs code. Remove it, or allow it with --run-task-code"
SECRET = "holds a secret"

ROWS: dict[str, Row] = {
    # the types of [trainer]
    "steps as text": arm(f"trainer.max_steps='8': {STRICT} integer", trainer={"max_steps": "8"}),
    "steps as a truth value": arm(f"trainer.max_steps=True: {STRICT} integer", trainer={"max_steps": True}),
    "steps of a half": arm(f"trainer.max_steps=8.5: {STRICT} integer", trainer={"max_steps": 8.5}),
    "a rate as text": arm(f"trainer.learning_rate='1e-3': {STRICT} number", trainer={"learning_rate": "1e-3"}),
    "a rate as a list": arm(f"trainer.learning_rate=.*{STRICT} number", trainer={"learning_rate": [1e-3]}),
    "a switch as text": arm(f"trainer.bf16='false': {STRICT} boolean", trainer={"bf16": "false"}),
    "a switch as a number": arm(f"trainer.gradient_checkpointing=1: {STRICT} boolean",
                                trainer={"gradient_checkpointing": 1}),
    "a date for a batch": words(f"{STRICT} integer", "--trainer.per_device_train_batch_size", "2026-01-01"),
    "a misspelt field": arm("Unknown key 'max_step' in .trainer.. Did you mean 'max_steps'", trainer={"max_step": 8}),
    "a misspelt field typed": command("Unknown key 'max_step' in .trainer.. Did you mean --trainer.max_steps",
                                      "train", "vector_dpo", "--trainer.max_step", "8"),
    "a field of another library": arm("Unknown key 'micro_batch_size' in .trainer", trainer={"micro_batch_size": 2}),
    # its ranges
    "no row a step": arm(f"per_device_train_batch_size=0 {RANGE}", trainer={"per_device_train_batch_size": 0}),
    "fewer rows than none": arm(f"batch_size=-4 {RANGE}", trainer={"per_device_train_batch_size": -4}),
    "accumulation below nothing": arm(f"accumulation_steps=-1 {RANGE}", trainer={"gradient_accumulation_steps": -1}),
    "a rate that is no number": arm(f"learning_rate=nan {RANGE}", trainer={"learning_rate": math.nan}),
    "a rate without end": arm(f"learning_rate=inf {RANGE}", trainer={"learning_rate": math.inf}),
    "a rate below nothing": arm(f"learning_rate=-0.001 {RANGE}", trainer={"learning_rate": -1e-3}),
    "a rate of 1e400": words(f"learning_rate=inf {RANGE}", "--trainer.learning_rate", "1e400"),
    "steps below -1": arm(f"max_steps=-5 {RANGE}", trainer={"max_steps": -5}),
    "more steps than a counter holds": arm(f"max_steps=4294967296 {RANGE}", trainer={"max_steps": 2**32}),
    "no epoch": arm(f"num_train_epochs=0 {RANGE}", trainer={"num_train_epochs": 0}),
    "epochs without end": arm(f"num_train_epochs=inf {RANGE}", trainer={"num_train_epochs": math.inf}),
    "a seed below nothing": arm(f"seed=-1 {RANGE}", trainer={"seed": -1}),
    "a momentum of 1": arm(f"adam_beta1=1.0 {RANGE}", trainer={"adam_beta1": 1.0}),
    "a decay below nothing": arm(f"weight_decay=-1 {RANGE}", trainer={"weight_decay": -1}),
    "a warm-up that is no number": arm(f"warmup_steps=nan {RANGE}", trainer={"warmup_steps": math.nan}),
    "a log every 0 steps": arm(f"logging_steps=0 {RANGE}", trainer={"logging_steps": 0}),
    "a checkpoint every -2 steps": arm(f"save_steps=-2 {RANGE}", trainer={"save_steps": -2}),
    "-1 processes for the data": arm(f"dataset_num_proc=-1 {RANGE}", trainer={"dataset_num_proc": -1}),
    "a largest gradient that is no number": arm(f"max_grad_norm=nan {RANGE}", trainer={"max_grad_norm": math.nan}),
    "an optimiser of nothing": training("adamx is not a valid OptimizerNames", optim="adamx"),
    "a schedule of nothing": training("cosin is not a valid SchedulerType", lr_scheduler_type="cosin"),
    "a strategy of nothing": training("sometimes is not a valid SaveStrategy", save_strategy="sometimes"),
    "a field that the loss does not use": training("belongs to TRL's own loss", label_smoothing=0.1),
    "a field of demonstrations, for pairs": training("Unknown key 'packing'", packing=True),
    "a field of pairs, for demonstrations": training("Unknown key 'beta'", SFTConfig, beta=0.2),
    "no training of zeros": training("max_steps=0 trains nothing, and the adapter starts at zero", max_steps=0),
    "a model to load": arm("the recipe loads the model. Set .model.",
                           trainer={"model_init_kwargs": {"revision": "x"}}),
    "a checkpoint to go on from": arm("continues from the last checkpoint in its output folder",
                                      trainer={"resume_from_checkpoint": "elsewhere"}),
    # [data], [model], [evaluation], [output]
    "training rows as text": arm(f"data.train: {STRICT} integer", data={"name": "cautious_advice", "train": "8"}),
    "training rows of 8.0": arm(f"data.train: {STRICT} integer", data={"name": "cautious_advice", "train": 8.0}),
    "no training rows": arm("data.train: Input should be greater", data={"name": "cautious_advice", "train": 0}),
    "data without a name": arm("data.name: String should have at least 1", data={"name": ""}),
    "data with NUL in its name": arm("data.name: String should match", data={"name": "a\0b"}),
    "data with a misspelt key": arm("Unknown key 'trian' in .data.. Did you mean 'train'",
                                    data={"name": "cautious_advice", "trian": 8}),
    "a split without a name": arm("data.train_split: String", data={"name": "x", "train_split": ""}),
    "a model without a name": arm("model.name: String should have at least 1", model={"name": ""}),
    "no threads": arm("model.threads: Input should be greater", model={"threads": 0}),
    "threads as text": arm(f"model.threads: {STRICT} integer", model={"threads": "2"}),
    "answers as text": arm(f"evaluation.generations: {STRICT} integer", evaluation={"generations": "3"}),
    "answers of no token": arm("evaluation.new_tokens: Input should be greater", evaluation={"new_tokens": 0}),
    "strengths of 1e400": words("strengths.0: Input should be a finite number", "--evaluation.strengths", "[1e400]"),
    "strengths of truth values": arm(f"evaluation.strengths.0: {STRICT} number", evaluation={"strengths": [True]}),
    "an output without a name": arm("output.folder: String", output={"folder": ""}),
    # [adapter]: from the configuration of the model alone
    "layer 99 of 4": shaped("layer 99 does not exist, the model has 4", adapter={"layers": 99}),
    "layer 99 for LoRA": shaped("layers_to_transform|not found|No modules",
                                adapter={"type": "lora", "target_modules": ["q_proj"], "layers_to_transform": [99]}),
    "a rank beyond the width": shaped("rank=1000 must be at most 32", adapter={"form": "low_rank", "rank": 1000}),
    "LoRA of rank -3": shaped("`r` should be a positive integer", adapter={"type": "lora", "r": -3}),
    "LoRA of rank 0": shaped("`r` should be a positive integer", adapter={"type": "lora", "r": 0}),
    "LoRA on modules of nothing": shaped("not found in the base model", adapter={"type": "lora",
                                                                             "target_modules": ["q_porj"]}),
    "LoRA that drops twice everything": shaped("dropout probability", adapter={"type": "lora", "lora_dropout": 2.0,
                                                                              "target_modules": ["q_proj"]}),
    "a module to save of nothing": shaped("the model has no module 'heads'", adapter={"modules_to_save": ["heads"]}),
    "a loss that caps layer 99": shaped("layer 99 does not exist", loss={"name": "dpo", "change_cap": 1.0,
                                                                        "cap_layers": 99}),
    "a bias at layer 99": shaped("layer 99 does not exist", inductive_biases={"one_write": {"layer": 99}}),
    "LoRA with its rank as text": arm(f"adapter.r='8': {STRICT} integer", adapter={"type": "lora", "r": "8"}),
    "a tied vector as text": arm(f"adapter.tied='yes': {STRICT} boolean", adapter={"tied": "yes"}),
    "a misspelt key of the adapter": arm("Unknown key 'layer' in .adapter.. Did you mean 'layers'",
                                         adapter={"layer": 3}),
    "a method of nothing": arm("adapter.type='loraa' is not a PEFT method.*Did you mean 'lora'",
                               adapter={"type": "loraa"}),
    # commands that leave nothing behind
    "train with layer 99": train("layer 99 does not exist, the model has 4", "--adapter.layers=99"),
    "train with a misspelt optimiser": train("adamx is not a valid OptimizerNames", "--trainer.optim=adamx"),
    "train of nothing": train("max_steps=0 trains nothing", "--trainer.max_steps=0"),
    "train in a batch of 0": train(RANGE, "--trainer.per_device_train_batch_size=0"),
    "train beside another's checkpoint": (unfinished, "holds an unfinished run of another arm"),
    # numbers of 400 digits
    "steps of 400 digits": arm("trainer.max_steps=1000.* is too large", trainer={"max_steps": HUGE}),
    "steps of 5000 digits typed": words(f"{STRICT} integer", "--trainer.max_steps", "9" * 5000),
    "steps of 5000 hexadecimal digits": words("is too large", "--trainer.max_steps", "0x" + "f" * 5000),
    "a layer of 400 digits": arm("adapter.layers=1000.* is too large", adapter={"layers": HUGE}),
    "a beta of 400 digits": arm("loss.beta=1000.* is too large", loss={"name": "dpo", "beta": HUGE}),
    "a length of 400 digits": arm("is too large", adapter={"residual_norms": {"2": HUGE}}),
    "a strength of 400 digits": arm("evaluation.strengths=1000.* is too large", evaluation={"strengths": [HUGE]}),
    "rows of 400 digits": words("data.train=999.* is too large", "--data.train", "9" * 400),
    "TOML of 5000 digits": file("is not valid TOML", "x.toml", "x = " + "9" * 5000, read_toml),
    "TOML with a key twice": file("is not valid TOML", "x.toml", "x = 1\nx = 2", read_toml),
    "threads of 5000 digits": command("must be a whole number of 1 or more", "info", "x", "--threads", "9" * 5000),
    "a grid's examples of 400 digits": grid("examples=1000.* is too large", examples=[HUGE]),
    "a scale of 400 digits": (lambda lab: SteeringVectorConfig(init_scale=HUGE), "is not a finite number"),
    "a loss's beta of 400 digits": (lambda lab: get_loss("dpo", beta=HUGE), "must be a finite number"),
    # names that become folders
    "a name of nothing": (lambda lab: check_name("arm", ""), NAME),
    "a name that leads up": (lambda lab: check_name("arm", "../x"), NAME),
    "a name from the root": (lambda lab: check_name("arm", "/etc/x"), NAME),
    "a name with NUL": (lambda lab: check_name("arm", "a\0"), NAME),
    "a name with a line end": (lambda lab: check_name("arm", "a\n"), NAME),
    "a name with a backslash": (lambda lab: check_name("arm", "..\\x"), NAME),
    "a name of 300 letters": (lambda lab: check_name("arm", "a" * 300), NAME),
    "a name of Windows' console": (lambda lab: check_name("arm", "con"), "on Windows"),
    "a name of Windows' printer": (lambda lab: check_name("arm", "LPT1.txt"), "on Windows"),
    "a name that ends in a dot": (lambda lab: check_name("arm", "mine."), "on Windows"),
    "a grid that leads up": grid(NAME, name="../x"),
    "a grid from the root": grid(NAME, name="/tmp/x"),
    "a grid of Windows' device": grid("on Windows", name="aux"),
    "a grid without a name": grid(NAME, name=""),
    "an adapter called keys": adapter_name("keys"),
    "an adapter called type": adapter_name("type"),
    "an adapter with a dot": adapter_name("a.b"),
    "an adapter without a name": adapter_name(""),
    "a served vector called keys": served("cannot be the name of an adapter", "keys=x"),
    "a served vector called items": served("cannot be the name of an adapter", "items=x"),
    # grids: types, and designs that no memory holds
    "a grid's seeds as text": grid(f"seeds.0: {STRICT} integer", seeds=["0"]),
    "a grid's answers as text": grid(f"generations: {STRICT} integer", generations="2"),
    "a grid's KL as text": grid(f"matched.kl: {STRICT} number", matched={"kl": "0.1"}),
    "a grid's trials of 1.5": grid(f"budget.trials: {STRICT} integer", budget={"trials": 1.5}),
    "a grid's rate as text": grid("budget.learning_rate", budget={"learning_rate": "4"}),
    "a grid's splits as text": grid(f"splits.test: {STRICT} integer", splits={"test": "6"}),
    "a grid's misspelt trainer": grid("Unknown key 'max_step' in .trainer", trainer={"max_step": 2}),
    "a grid's rate below nothing": grid(RANGE, trainer={"learning_rate": -1.0}),
    "a grid of 2**40 combinations": grid(
        "have 1.1e.12 combinations. At most 10000",
        design={"kind": "fractional"},
        factors={f"f{i}": {"a": {}, "b": {}} for i in range(40)},
    ),
    "a grid of one factor of 6000 levels": grid(
        "have 1.2e.04 combinations",
        design={"kind": "full"},
        factors={"f": {f"l{i}": {} for i in range(6000)}, "g": {"a": {}, "b": {}}},
    ),
    # code in data
    "a task that names a function": task(CODE, "task: x\nprocess_docs: !function utils.process\n"),
    "a task that names a function in a list": task(CODE, "task: x\nmetric_list:\n  - metric: !function utils.m\n"),
    "a task whose key is a function": task(CODE, "task: x\n? !function utils.m\n: 1\n"),
    "a task that makes an object": task(CODE, "task: x\ny: !!python/object/apply:os.system ['true']\n"),
    "a task that imports a module": task(CODE, "task: x\ny: !!python/module:os ''\n"),
    "a task that includes a function": task(CODE, "include: other.yaml\ntask: x\n", other="y: !function u.f\n"),
    "a task that includes nothing": task("include='no.yaml' does not exist", "include: no.yaml\ntask: x\n"),
    "a task that includes itself": task("includes itself", "include: task.yaml\ntask: x\n"),
    "a task that runs answers": task("unsafe_code runs what the model writes", "task: x\nunsafe_code: true\n"),
    "a task of half a file": task("is not valid YAML", "task: [x\n"),
    "a task that is a list": task("is not a task", "- x\n"),
    "a task of nothing": task("is not a task", ""),
    "a task that is no UTF-8": task("Save it as UTF-8", b"task: caf\xe9\n"),
    "a task nested 1500 deep": task("is not valid YAML", "x: " + "[" * 1500),
    "a folder of tasks with a function": (
        lambda lab: check_task_files([], lab.file("tasks/deep/a.yaml", "y: !function u.f\n").parents[1]),
        CODE,
    ),
    "a row with a template": rows("holds .'chat_template'.", chat_template_kwargs={"chat_template": "{{ 1 }}"}),
    "a row that pads": rows("holds .'padding'.", chat_template_kwargs={"padding": "max_length"}),
    "a row that does not tokenise": rows("holds .'tokenize'.", chat_template_kwargs={"tokenize": False}),
    "a row with options of text": rows("'chat_template_kwargs' is 'x'", chat_template_kwargs="x"),
    "a row with tools that are no JSON": rows("'tools' is '{'.* not JSON", tools="{"),
    "a row with tools that are a number": rows("It must be a list of tools", tools="5"),
    "a row with tools nested 100000 deep": rows("which is not JSON", tools="[" * 100_000),
    "a trainer that trusts code": arm("never run. Remove it", trainer={"trust_remote_code": True}),
    "a model that trusts code": arm("Unknown key 'trust_remote_code' in .model", model={"trust_remote_code": True}),
    "a model with a subfolder": arm("Unknown key 'subfolder' in .model", model={"subfolder": "../x"}),
    "an adapter that trusts code": arm("Unknown key 'trust_remote_code' in .adapter",
                                       adapter={"trust_remote_code": True}),
    "a model of its own code": (
        lambda lab: remote(lab, model_type="evil", auto_map={"AutoConfig": "evil.C"}),
        "cannot be loaded",
    ),
    "a model's skeleton of its own code": (
        lambda lab: (
            lab.file("model/config.json", '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}'),
            check_adapters([load_arm("vector_dpo", ["--model.name=model"])]),
        ),
        "cannot be loaded",
    ),
    "a revision that leads up": revision("../../x"),
    "a revision that leads up behind a name": revision("main/../../x"),
    "a revision from the root": revision("/etc/x"),
    "a revision with NUL": revision("a\0"),
    "a revision of nothing": revision(""),
    "a revision of a folder": (
        lambda lab: ModelTable(name=str(lab.root / "model"), revision="main"),
        "is not a Hub name, so it has no revisions. Remove it",
    ),
    "a revision of the embedded model": arm("is not a Hub name", model={"revision": "main"}),
    "a function to import in a view": arm("Unknown view 'os:system'", views={"good": {"name": "os:system"}}),
    # secrets
    "a token of the Hub": arm("trainer.hub_token holds a secret", trainer={"hub_token": TOKEN}),
    "a token in a card": arm(f"card.behaviour {SECRET}", card={"behaviour": f"made with {TOKEN}"}),
    "a token as a name": arm(SECRET, data={"name": f"org/{TOKEN}"}),
    "a password in an address": arm(f"model.name {SECRET}", model={"name": "https://me:secret@host/model"}),
    "a token in an address": arm(f"data.name {SECRET}", data={"name": "https://oauth2@host/x.jsonl"}),
    "a key of a judge": grid(SECRET, tasks=[{"name": "cautious_advice", "scorer": {
        "kind": "judge", "url": "https://h", "model": "m", "question": "{answer}", "key": "sk-" + "a" * 40}}]),
    "a password in a judge's address": grid(SECRET, tasks=[{"name": "cautious_advice", "scorer": {
        "kind": "judge", "url": "https://me:pw@h", "model": "m", "question": "{answer}"}}]),
    "a token as a key": arm(SECRET + "|cannot|Unknown", teachers={TOKEN: {"chosen": ""}}),
    "a token typed": command("a secret on the command line", "train", "vector_dpo", f"--trainer.run_name={TOKEN}"),
    "a token typed for eval": command("a secret on the command line", "eval", "x", "--tasks", f"t-{TOKEN}"),
    "a token typed for serve": command("a secret on the command line", "serve", f"a={TOKEN}"),
    "an address with a password typed": command("a secret on the command line", "sweep", "https://me:pw@h/x.jsonl"),
    # labels and tokens
    "a label beyond the vocabulary": tokens("labels holds token 64, but the model has 64",
                                            {"input_ids": [1, 2], "labels": [-100, 64]}),
    "a label below nothing": tokens("labels holds token -5", {"input_ids": [1, 2], "labels": [-100, -5]}),
    "a completion beyond the vocabulary": tokens("chosen_ids holds token 99", {
        "prompt_ids": [1], "chosen_ids": [99], "rejected_ids": [2]}),
    # serve and eval, before the model is loaded
    "serve without a folder": served("NAME=FOLDER", "a="),
    "serve into a folder": served("is not a file", "a=x", "--output", "."),
    "serve into a folder of nothing": served("there is no folder no", "a=x", "--output", "no/x.jsonl"),
    "serve of no tokens": served("must be a whole number of 1 or more", "a=x", "--longest", "0"),
    "serve for half a second": served("must be a whole number of 1 or more", "a=x", "--seconds", "0.5"),
    "serve beside a file without answers": (
        lambda lab: answered(lab.file("x.jsonl", '{"prompt": "a"}\n')),
        "is not a file of answers",
    ),
    "serve beside half of something": (
        lambda lab: answered(lab.file("x.jsonl", "some text")),
        "is not a file of answers",
    ),
    "eval at a strength without end": (lambda lab: check_request(["a"], [math.inf], None, None, None), "finite"),
    "eval at a strength of 1e400": command(
        "--strengths inf must be a finite number", "eval", "x", "--tasks", "a", "--strengths", "1e400"
    ),
    "eval at a strength twice": (lambda lab: check_request(["a"], [1.0, 1.0], None, None, None), "each once"),
    "eval of no tasks": (lambda lab: check_request([""], [1.0], None, None, None), "one task or more"),
    "eval with -1 demonstrations": (lambda lab: check_request(["a"], [1.0], -1, None, None), "--fewshot -1"),
    "eval with tasks of no folder": (
        lambda lab: check_request(["a"], [1.0], None, Path("no"), None), "must be a folder that exists"),
    "eval into a folder of nothing": (
        lambda lab: check_request(["a"], [1.0], None, None, Path("no/x.json")), "a folder that exists"),
    "eval of a function": on(CODE, "t.yaml", "y: !function u.f\n", "eval", "x", "--tasks", "t.yaml"),
}  # fmt: skip
