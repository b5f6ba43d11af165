"""Does the instrument tell the truth? Grids on problems whose answer is known.

    python -m steertune.recipes.planted --folder runs/planted

A teacher is the base model plus one known change; of two random answers it calls the likelier one chosen. The arms
cross the form of the adapter with its layer. Asked is how often a study names the teacher's form and layer, how often
it claims a difference where there is none, and how often its 95 % intervals hold the true difference.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.ablate import check_folder, run
from steertune.recipes.ablation.bench import Bench
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.factorial import effects
from steertune.recipes.ablation.statistics.paired import FEW, corrected, interval, p_value
from steertune.recipes.ablation.tidy import read_cells
from steertune.recipes.arm import ArmError
from steertune.recipes.training import set_threads, write_whole

WORDS, LENGTH, LAYER, WRONG_LAYER = 60, 6, 2, 0
FORMS = ("bias", "gated", "lora")
PROBLEMS = ("bias", "gated", "lora", "base", "shuffled")
STUDIES = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="planted", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--replicates", type=int, default=40, help="independent data sets of every problem")
    parser.add_argument("--examples", type=int, default=256, help="training pairs")
    parser.add_argument("--pairs", nargs="+", type=int, default=[5, 10, 20], help="replicates in one study")
    parser.add_argument("--folder", type=Path, default=Path("runs/planted"))
    options = parser.parse_args(argv)
    set_threads(1)  # the models are tiny
    gc.freeze()  # each test of many corrections collects garbage, which takes longer than the test
    disable_progress_bars()
    found = {}
    for problem in options.problems:
        try:
            found[problem] = _cells(problem, options)
        except ArmError as error:
            print(f"ArmError: {error}", file=sys.stderr)
            return 2
    table = summarise(found, options.pairs)
    write_whole(options.folder / "table.md", table)
    print(table)
    return 0


def _cells(problem: str, options: argparse.Namespace) -> Frame:
    """The cells of all replicates of a problem; those that are there already are not run again."""
    folder = options.folder / problem
    names = [f"r{i:03d}" for i in range(options.replicates)]
    base = folder.parent / "base"
    if not (base / "config.json").exists():
        save_base(base)
    missing = [name for name in names if not (folder / "data" / name / "test.jsonl").exists()]
    if missing:
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        for name in tqdm(missing, desc=f"Sampling {problem}"):
            write_task(folder / "data" / name, model, problem, seed=PROBLEMS.index(problem) * 10_000 + int(name[1:]))
    grid = make_grid(tables(base, [str(folder / "data" / name) for name in names], options.examples))
    cells = grid.cells()
    check_folder(folder, cells)
    run(grid, cells, Bench(grid), folder)
    return read_cells(folder, [str(cell.path) for cell in cells])


def tables(base: Path, tasks: list[str], examples: int) -> dict[str, Any]:
    """The grid: form x layer, one tuning budget for all."""
    lora = {"type": "lora", "r": 1, "lora_alpha": 15, "target_modules": ["down_proj"]}
    at = {"right": LAYER, "wrong": WRONG_LAYER}
    return {
        "name": "planted",
        "model": {"name": str(base), "threads": 1},
        "neutral": str(base / "neutral.jsonl"),
        "tasks": [{"name": task, "scorer": {"kind": "rule", "pattern": "w1"}} for task in tasks],
        "examples": [examples],
        "seeds": [0],
        "generations": 0,
        "trainer": {"per_device_train_batch_size": 16},
        "loss": {"beta": 1.0},  # margins here are a few nats
        "splits": {"validation": 40, "test": 100, "scorer": 0, "near_duplicates": 1.0},
        "budget": {"trials": 1, "steps": [40], "strengths": [0.5, 1.0, 2.0], "per": "cell"},
        "matched": {"kl": 0.02},
        "card": {
            "problem": "Does the instrument find the change that was planted?",
            "hypothesis": "The arm with the teacher's own form and layer is the best.",
            "against": "Another arm is named, or a difference is claimed where there is none.",
            "baselines": "The other forms, and the wrong layer.",
            "affordances": {"*": "the same pairs, the same budget"},
        },
        "design": {"kind": "full"},
        "factors": {
            "form": {
                "bias": {"adapter": {"type": "steering_vector", "form": "bias"}, "trainer": {"learning_rate": 0.3}},
                "gated": {"adapter": {"type": "steering_vector", "form": "gated"}},
                "lora": {"adapter": lora, "trainer": {"learning_rate": 0.005}},
            },
            "layer": {
                level: [
                    {"when": {"form": "lora"}, "adapter": {"layers_to_transform": [layer]}},
                    {"adapter": {"layers": [layer]}},
                ]
                for level, layer in at.items()
            },
        },
    }


# -- teachers and their data --------------------------------------------------------------------------------------


def save_base(folder: Path) -> None:
    """A tiny random model, its tokenizer (one word is one token), and neutral text."""
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.12, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # lively inner activations, so that a change of weights matters
        parameter.data *= 8.0 if "gate_proj" in name or "up_proj" in name else 0.1 if "down_proj" in name else 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts, answers = torch.randint(4, 4 + WORDS, (2, 16, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = [{"prompt": _words(p) + " ", "completion": _words(a)} for p, a in zip(prompts, answers, strict=True)]
    _write_rows(folder / "neutral.jsonl", rows)


def write_task(folder: Path, base: Any, problem: str, seed: int) -> None:
    """Training and test pairs of one replicate: another teacher of the same kind, other prompts and answers."""
    generator = torch.Generator().manual_seed(seed)
    teacher = make_teacher(base, problem, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", 300), ("test", 100)):
        coin = problem == "base" or (problem == "shuffled" and split == "train")
        _write_rows(folder / f"{split}.jsonl", sample_pairs(teacher, rows, generator, coin))


def make_teacher(base: Any, problem: str, seed: int) -> Any:
    """The base plus a random change of the kind that the problem plants; large enough to be learned."""
    torch.manual_seed(seed)
    if problem == "base":
        return base
    if problem == "lora":
        config: Any = LoraConfig(r=1, lora_alpha=15, target_modules=["down_proj"], layers_to_transform=[LAYER])
    else:
        config = SteeringVectorConfig(form="gated" if problem == "gated" else "bias", layers=[LAYER])
    teacher = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in teacher.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "steering_vector_v" in name or "steering_vector_w" in name:
            torch.nn.init.normal_(parameter, std=3.0 if problem == "gated" else 8.0)
        elif "steering_vector_b" in name:
            torch.nn.init.zeros_(parameter)
    return teacher


def sample_pairs(teacher: Any, rows: int, generator: torch.Generator, coin: bool) -> list[dict[str, str]]:
    """Random prompts, each with two random answers; chosen is the one likelier to the teacher, or what a coin says."""
    prompts, first, second = (torch.randint(4, 4 + WORDS, (rows, LENGTH), generator=generator) for _ in range(3))
    better = _logps(teacher, prompts, first) > _logps(teacher, prompts, second)
    if coin:
        better = torch.rand(rows, generator=generator) < 0.5
    return [
        {
            "prompt": _words(prompts[i]) + " ",
            "chosen": _words(first[i] if better[i] else second[i]),
            "rejected": _words(second[i] if better[i] else first[i]),
        }
        for i in range(rows)
    ]


@torch.no_grad()
def _logps(model: Any, prompts: Tensor, answers: Tensor) -> Tensor:
    """`log p(answer)`, `(rows,)`."""
    logps = model(input_ids=torch.cat([prompts, answers], dim=1)).logits[:, LENGTH - 1 : -1].log_softmax(-1)
    return logps.gather(2, answers[:, :, None]).sum(dim=(1, 2))


def _words(ids: Tensor) -> str:
    return " ".join(f"w{int(i) - 4}" for i in ids)


def _write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))


# -- what the studies say -----------------------------------------------------------------------------------------


def summarise(cells: dict[str, Frame], sizes: Sequence[int]) -> str:
    """Markdown: per problem the arms' means, then what studies of several sizes claim, and how good intervals are."""
    lines = ["# Planted problems", "", "Mean held-out accuracy of every arm (form/layer) over all replicates.", ""]
    arms = [f"{form}/{layer}" for form in FORMS for layer in ("right", "wrong")]
    lines += ["| teacher | replicates | base | " + " | ".join(arms) + " |", "|---" * (len(arms) + 3) + "|"]
    for problem, frame in cells.items():
        means = frame.groupby(["form", "layer"])["accuracy"].mean()
        values = " | ".join(f"{means[form, layer]:.3f}" for form in FORMS for layer in ("right", "wrong"))
        lines.append(f"| {problem} | {frame.task.nunique()} | {frame.base_accuracy.mean():.3f} | {values} |")
    lines += [
        "",
        "## What studies claim",
        "",
        *_claims(cells, sizes),
        "",
        "## Intervals",
        "",
        *_coverage(cells, sizes),
    ]
    return "\n".join(lines) + "\n"


def _claims(cells: dict[str, Frame], sizes: Sequence[int]) -> list[str]:
    lines = [
        f"{STUDIES} studies of each size, drawn from the replicates. A claim is a corrected permutation test at 5 % "
        "over the study's effects (gated and LoRA against bias, wrong layer against right). *Form named*: the "
        "teacher's form has the highest mean. *Form claimed*: it is also significantly better than `bias`, or for the "
        "bias teacher, no other form is claimed to be better and one is claimed to be worse. *False claim*: that a "
        "form or layer other than the teacher's is better; for `base`, whose labels are a coin's, any claim; for "
        "`shuffled`, whose training labels are a coin's and whose test labels a bias teacher's, that an arm beats the "
        "base.",
        "",
        "| teacher | pairs | form named | form claimed | layer claimed | false claim |",
        "|---|---|---|---|---|---|",
    ]
    for problem, frame in cells.items():
        for size in sizes:
            studies = [_study(problem, frame, tasks) for tasks in _draws(frame, size)]
            rates = [sum(study[i] for study in studies) / len(studies) for i in range(4)]
            shown = [f"{rate:.0%}" for rate in rates]
            if problem not in FORMS:
                shown[:3] = ["", "", ""]
            lines.append(f"| {problem} | {size} | " + " | ".join(shown) + " |")
    return lines


def _draws(frame: Frame, size: int) -> list[list[str]]:
    names = sorted(frame.task.unique())
    rng = np.random.default_rng(size)
    return [list(rng.choice(names, size=min(size, len(names)), replace=False)) for _ in range(STUDIES)]


def _study(problem: str, frame: Frame, tasks: list[str]) -> tuple[bool, bool, bool, bool]:
    """Whether a study names the form, claims it, claims the layer, and claims something false."""
    rows = frame[frame.task.isin(tasks)]
    if problem == "shuffled":
        return False, False, False, _beats_the_base(rows)
    found = {
        (e.factor, e.level): (e.interval.estimate, e.p < 0.05) for e in effects(rows, ["form", "layer"], "accuracy")
    }
    form = {level: found["form", level] for level in FORMS[1:]}
    wrong_layer = found["layer", "wrong"]
    claimed = {level: (gain > 0, sure) for level, (gain, sure) in form.items()}
    if problem not in FORMS:
        return False, False, False, any(sure for _, sure in found.values())
    named = rows[rows.layer == "right"].groupby("form")["accuracy"].mean().idxmax() == problem
    better = [level for level, (up, sure) in claimed.items() if up and sure]
    worse = [level for level, (up, sure) in claimed.items() if sure and not up]
    right = bool(worse) and not better if problem == "bias" else problem in better
    false = any(level != problem for level in better) or problem in worse or (wrong_layer[0] > 0 and wrong_layer[1])
    return bool(named), right, wrong_layer[0] < 0 and wrong_layer[1], false


def _beats_the_base(rows: Frame) -> bool:
    """Whether an arm is claimed to be better than the base model."""
    gains = [(arm.accuracy - arm.base_accuracy).to_numpy() for _, arm in rows.groupby(["form", "layer"])]
    tests = corrected([p_value(gain) for gain in gains])
    return any(gain.mean() > 0 and p < 0.05 for gain, p in zip(gains, tests, strict=True))


def _coverage(cells: dict[str, Frame], sizes: Sequence[int]) -> list[str]:
    lines = [
        "How often the 95 % interval of an effect (the three above, of every problem) holds the mean over all "
        f"replicates, by method; the instrument takes `t` below {FEW} pairs and `bca` from there on. For `base` "
        "the truth is 0.",
        "",
        "| pairs | `t` | `bca` | permutation test at 5 % rejects a true zero |",
        "|---|---|---|---|",
    ]
    for size in sizes:
        hits: dict[str, list[bool]] = {"t": [], "bca": []}
        rejected = []
        for problem, frame in cells.items():
            for gaps in _gaps(frame):
                truth = 0.0 if problem == "base" else float(gaps.mean())
                for tasks in _draws(frame, size)[: STUDIES // 5]:
                    values = gaps.loc[tasks].to_numpy()
                    for method, seen in hits.items():
                        found = interval(values, method=method)
                        seen.append(found.low <= truth <= found.high)
                    if problem == "base":
                        rejected.append(p_value(values) < 0.05)
        shown = [f"{np.mean(seen):.1%}" for seen in (*hits.values(), rejected or [np.nan])]
        lines.append(f"| {size} | " + " | ".join(shown) + " |")
    return lines


def _gaps(frame: Frame) -> list[Frame]:
    """Per replicate: gated and LoRA minus bias, and the wrong minus the right layer."""
    found = []
    for factor in ("form", "layer"):
        means = frame.pivot_table(index="task", columns=factor, values="accuracy")
        first, *others = FORMS if factor == "form" else ("right", "wrong")
        found += [means[level] - means[first] for level in others]
    return found


if __name__ == "__main__":
    sys.exit(main())
