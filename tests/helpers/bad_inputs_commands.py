"""Command lines of every recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from bad_inputs import Lab, Row, run

from steertune.recipes import cli


def said(says: str, recipe: str, *words: str, before: Callable[[Lab], Any] | None = None) -> Row:
    """A recipe's words; `{root}` and `{here}` are the lab's folders."""

    def call(lab: Lab) -> None:
        if before is not None:
            before(lab)
        given = [word.replace("{root}", str(lab.root)).replace("{here}", str(lab.here)) for word in words]
        run(import_module(cli.find(recipe)[1]).main, given)

    return call, says


def command(says: str, *words: str) -> Row:
    return (lambda lab: run(cli.main, words)), says


def few(says: str, *words: str, before: Callable[[Lab], Any] | None = None) -> Row:
    """`train` on four pairs of the lab."""
    pairs = ("--data.name={root}/task/train.jsonl", "--data.train=4", "--data.test=2", "--output.folder=o")
    return said(says, "train", "vector_dpo", *pairs, *words, before=before)


def on(says: str, name: str, content: str | bytes, recipe: str, *words: str) -> Row:
    """With a file of the test's."""
    return said(says, recipe, *words, before=lambda lab: lab.file(name, content))


def half_an_adapter(lab: Lab) -> None:
    folder = lab.adapter()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def no_config(lab: Lab) -> None:
    (lab.adapter() / "adapter_config.json").unlink()


def pickled_model(lab: Lab) -> None:
    lab.file("model/config.json", (lab.root / "model/config.json").read_bytes())
    lab.file("model/pytorch_model.bin", b"\x80\x04N.")


def model_with_code(lab: Lab) -> None:
    config = json.loads((lab.root / "model/config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    lab.file("model/config.json", json.dumps(config))
    lab.file("model/evil.py", "import os\nos.mkdir('sprung')\n")


def finished(lab: Lab) -> None:
    lab.file("done/result.json", "{}")


def other_arm(lab: Lab) -> None:
    lab.file("half/config.json", b"\xff\xfe")


def pipe(lab: Lab) -> None:
    os.mkfifo(lab.here / "prompts")


WHOLE = "must be a whole number of 1 or more"
NO_ARM = "ArmError: No arm 'nothing'.*neither a .toml file nor one of"
NO_GRID = "ArmError: No grid 'nothing'"
NO_ADAPTER = "is not an adapter folder: it has no adapter_config.json"

ROWS: dict[str, Row] = {
    "steertune of nothing known": command("No such command 'trian'. Did you mean 'train'", "trian"),
    "steertune of a path": command("No such command '../x'", "../x"),
    "steertune of a private module": command("No such command 'files'", "files"),
    "config of nothing known": said("No configuration 'zero4'; there are .*Did you mean 'zero", "config", "zero4"),
    "config of a path": said("No configuration '../../x'", "config", "../../x"),
    "config of a file": said("No configuration 'zero2.yaml'", "config", "zero2.yaml"),
    # train and distill
    "train of nothing": said(NO_ARM, "train", "nothing"),
    "train of a path that is a folder": said(
        "No arm 'x.toml'", "train", "x.toml", before=lambda lab: (lab.here / "x.toml").mkdir()
    ),
    "train with an unknown flag": said(
        "No such option: --thread. Did you mean --threads", "train", "vector_dpo", "--thread", "5"
    ),
    "train into a finished run": said(
        "holds a finished run .*Choose another", "train", "vector_dpo", "--output.folder=done", before=finished
    ),
    "train into another's run": said(
        "Save it as UTF-8", "train", "vector_dpo", "--output.folder=half", before=other_arm
    ),
    "train into a file": on(
        "file is a file. Choose another output folder", "file", "x", "train", "vector_dpo", "--output.folder=file"
    ),
    "train of a prompt": said("is a prompt, so there is nothing to train", "train", "prompt_contrast"),
    "train on data that are not there": said(
        "no such file or folder", "train", "vector_dpo", "--data.name=./no.jsonl", "--output.folder=o"
    ),
    "train on half a file": on(
        "cannot be read as json",
        "x.jsonl",
        '{"prompt": "a',
        "train",
        "vector_dpo",
        "--data.name=x.jsonl",
        "--output.folder=o",
    ),
    "train on too few rows": said(
        "32 rows requested.*Ask for fewer", "train", "vector_dpo", "--data.name={root}/task", "--output.folder=o"
    ),
    "train of a model that is not there": few(
        "model.name='./nowhere' cannot be loaded.*safetensors", "--model.name=./nowhere"
    ),
    "train of a pickled model": few("cannot be loaded.*safetensors", "--model.name=model", before=pickled_model),
    "train of a model with code": few("cannot be loaded", "--model.name=model", before=model_with_code),
    "train of a layer that is not there": few(
        "layer 99 does not exist, the model has 4",
        "--model.name={root}/model",
        "--adapter.layers=99",
        "--evaluation.generations=0",
    ),
    "distill of nothing": said(NO_ARM, "distill", "nothing"),
    "distill of an arm without a prompt": said(
        "does not learn from a prompt. Use context_distillation", "distill", "vector_dpo"
    ),
    # grids
    "ablate of nothing": said(NO_GRID, "ablate", "nothing"),
    "ablate of a path": said("No grid '../../x'", "ablate", "../../x"),
    "ablate without a grid": said("Missing argument 'grid'", "ablate"),
    "ablate with no threads": said(f"--threads': '0' {WHOLE}", "ablate", "quick", "--threads", "0"),
    "ablate with threads of look-alike digits": said(WHOLE, "ablate", "quick", "--threads", "\u0662"),
    "ablate with half a grid": on("x.toml is not valid TOML", "x.toml", "[card", "ablate", "x.toml"),
    "benchmark_grid of nothing": said(NO_GRID, "benchmark_grid", "nothing"),
    "report of nothing": said("holds no grid", "report", "{here}"),
    "report of half a grid": on("is damaged", "grid.json", "{", "report", "{here}"),
    "report of an unknown measure": said("'acc' must be one of accuracy", "report", "{here}", "--measure", "acc"),
    "contrast_prompts of nothing": said("No file 'nothing'. Names: ", "contrast_prompts", "nothing"),
    "contrast_prompts of half a file": on("not valid TOML", "x.toml", "seen = [", "contrast_prompts", "x.toml"),
    "planted of no studies": said(WHOLE, "planted", "--studies", "0"),
    "planted of an unknown problem": said("'vector' must be one of bias", "planted", "--problems", "vector"),
    "gradients of one batch": said(
        "two batches or more", "gradients", "cautious_advice", "--pairs", "4", "--batch", "4"
    ),
    "gradients of batches of text": said("--batch': 'x'", "gradients", "cautious_advice", "--batch", "x"),
    "gradients of an arm of nothing": said(NO_ARM, "gradients", "cautious_advice", "--arm", "nothing"),
    "probes of too few pairs": said("8 pairs or more", "probes", "cautious_advice", "--train", "7"),
    "probes of an unknown direction": said(
        "direction='lta' is not one of .*'lat'", "probes", "cautious_advice", "--methods", "lta"
    ),
    "probes of no data": said("no such file or folder", "probes", "./no.jsonl"),
    "probes of demonstrations": on(
        "directions are fitted on pairs",
        "x.jsonl",
        '{"prompt": "a ", "completion": "b"}\n' * 9,
        "probes",
        "x.jsonl",
        "--train",
        "8",
        "--test",
        "1",
    ),
    "benchmark of no tokens": said(WHOLE, "benchmark", "--tokens", "0"),
    "benchmark of half a row": said("--rows 128 must be TOKENS/PROMPT", "benchmark", "--rows", "128"),
    "scale on no GPU": said(WHOLE, "scale", "--gpus", "0"),
    "scale of nothing": said("model.name=.*nowhere.*cannot be loaded", "scale", "./nowhere"),
    # adapters
    "info of nothing": said(NO_ADAPTER, "info", "nowhere"),
    "info of a file": on(NO_ADAPTER, "file", "x", "info", "file"),
    "info of half an adapter": said("not a readable safetensors file", "info", "adapter", before=half_an_adapter),
    "info without a configuration": said(NO_ADAPTER, "info", "adapter", before=no_config),
    "info on a model that is not there": said(
        "cannot be loaded", "info", "adapter", "--model", "./nowhere", before=lambda lab: lab.adapter()
    ),
    "chat with nothing": said(NO_ADAPTER, "chat", "nowhere"),
    "chat at strength NaN": said("strength=nan", "chat", "nowhere", "--strength", "nan"),
    "chat of no words": said(WHOLE, "chat", "nowhere", "--new-tokens", "0"),
    "chat at no temperature": said("temperature=-1.0", "chat", "nowhere", "--temperature", "-1"),
    "export of nothing": said(NO_ADAPTER, "export", "nowhere", "--to", "peft", "--output", "o"),
    "export to an unknown target": said(
        "'pfet' must be one of .*Did you mean 'peft'", "export", "nowhere", "--to", "pfet", "--output", "o"
    ),
    "export at strength 0": said(
        "--strength 0 must be a finite number that is not 0",
        "export",
        "x",
        "--to",
        "peft",
        "--output",
        "o",
        "--strength",
        "0",
    ),
    "export at strength infinity": said(
        "--strength inf", "export", "x", "--to", "peft", "--output", "o", "--strength", "inf"
    ),
    "export from a pipe": said(
        "the file does not exist", "export", "prompts", "--from", "gguf", "--model", "m", "--output", "o", before=pipe
    ),
    "export from noise": on(
        "not a readable GGUF", "x.gguf", b"GGUF", "export", "x.gguf", "--from", "gguf", "--model", "m", "--output", "o"
    ),
}
