"""Does the instrument tell the truth? Whole studies of problems whose answer is known.

    python -m steertune.recipes.planted --folder runs/planted

A teacher is the base model plus one known change: a vector, a rank-one gate or a rank-one LoRA at a known layer, or
nothing. Chosen is the answer that the change makes likelier. Every study is a grid of its own, with tasks, seeds and
matched KL as in a real one (but nothing to tune), whose arms cross the form of the adapter with its layer. Asked is
how often a study names and claims the teacher's form and layer, how often it claims a difference where there is none,
and how often its 95 % intervals hold the true difference.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from peft import LoraConfig, get_peft_model
from statsmodels.stats.proportion import proportion_confint
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.checks import CHECKSUMS, check_checksums, write_checksums
from steertune.recipes.ablate import check_folder, run
from steertune.recipes.ablation import analysis
from steertune.recipes.ablation.bench import Bench
from steertune.recipes.ablation.grid import Grid, make_grid
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.factorial import effects
from steertune.recipes.ablation.statistics.paired import Difference, corrected
from steertune.recipes.ablation.tidy import read_cells
from steertune.recipes.files import ArmError, write_whole
from steertune.recipes.processes import begin, command, positive

WORDS, LENGTH, LAYER, WRONG_LAYER = 60, 6, 2, 0
FORMS = ("bias", "gated", "lora")
PROBLEMS = ("bias", "gated", "lora", "base", "shuffled")
TASKS, SEEDS, EXAMPLES, TEST = 2, 4, 128, 60
MEASURE = "matched_accuracy"
_CANDIDATES = 4  # random pairs a teacher chooses its clearest from


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="planted", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--studies", type=positive, default=8, help="of every problem but base")
    parser.add_argument("--nulls", type=positive, default=20, help="studies of base, where every claim is a false one")
    parser.add_argument("--folder", type=Path, default=Path("runs/planted"))
    options = parser.parse_args(argv)
    begin(1, only_one=True)  # the models are tiny
    gc.freeze()  # each test of many corrections collects garbage, which takes longer than the test
    disable_progress_bars()
    base = options.folder / "model"
    if not (base / CHECKSUMS).exists():
        save_base(base)
    check_checksums(base)
    numbers = [
        (problem, i)
        for problem in options.problems
        for i in range(options.nulls if problem == "base" else options.studies)
    ]
    found: dict[str, list[Study]] = {problem: [] for problem in options.problems}
    for problem, i in tqdm(numbers, desc="Studies", unit="study"):
        found[problem].append(study(problem, i, base, options.folder))
    table = summarise(found)
    write_whole(options.folder / "table.md", table)
    print(table)
    return 0


def study(problem: str, number: int, base: Path, folder: Path) -> Study:
    """Run a study, or what is left of it, and read what it says."""
    home = folder / problem / f"s{number:03d}"
    tasks = [home / "data" / f"t{i}" for i in range(TASKS)]
    model: Any = None
    for i, task in enumerate(tasks):
        if not (task / CHECKSUMS).exists():
            model = model or AutoModelForCausalLM.from_pretrained(base).eval()
            write_task(task, model, problem, seed=(PROBLEMS.index(problem) * 1000 + number) * TASKS + i)
        check_checksums(task)
    grid = make_grid(tables(problem, base, [str(task) for task in tasks]))
    cells = grid.cells()
    check_folder(home, cells)
    failed = run(grid, cells, Bench(grid), home, show=False)
    if failed:
        raise ArmError(f"{len(failed)} cells of {home} failed, the first {failed[0]}: see their failed.json.")
    return read_study(problem, grid, read_cells(home, [str(cell.path) for cell in cells]))


def tables(problem: str, base: Path, tasks: list[str]) -> dict[str, Any]:
    """The grid: form x layer, one tuning budget for all."""
    lora = {"type": "lora", "r": 1, "lora_alpha": 15, "target_modules": ["down_proj"]}
    at = {"right": LAYER, "wrong": WRONG_LAYER}
    true = problem if problem in FORMS else "bias"
    start = {"form": "lora" if true != "lora" else "bias", "layer": "wrong"}
    end = {"form": true, "layer": "right"}
    return {
        "name": "planted",
        "model": {"name": str(base), "threads": 1},
        "neutral": str(base / "neutral.jsonl"),
        "tasks": [{"name": task, "scorer": {"kind": "rule", "pattern": "w1"}} for task in tasks],
        "examples": [EXAMPLES],
        "seeds": list(range(SEEDS)),
        "generations": 0,
        "trainer": {"per_device_train_batch_size": 16},
        "loss": {"beta": 1.0},  # margins here are a few nats
        "splits": {"validation": 40, "test": TEST, "scorer": 0, "near_duplicates": 1.0},
        "budget": {"trials": 1, "steps": [20]},
        "matched": {"kl": 0.3},
        "card": {
            "problem": "Does the instrument find the change that was planted?",
            "hypothesis": "The arm with the teacher's own form and layer is the best.",
            "against": "Another arm is named, or a difference is claimed where there is none.",
            "baselines": "The other forms, and the wrong layer.",
            "affordances": {"*": "the same pairs, the same budget"},
        },
        "claim": {"better": _arm(end), "than": _arm(start), "measure": MEASURE},
        "design": {"kind": "full", "start": start, "end": end},
        "factors": {
            "form": {
                "bias": {"adapter": {"type": "steering_vector", "form": "bias"}, "trainer": {"learning_rate": 1.0}},
                "gated": {
                    "adapter": {"type": "steering_vector", "form": "gated"}, "trainer": {"learning_rate": 0.3}
                },
                "lora": {"adapter": lora, "trainer": {"learning_rate": 0.03}},
            },
            "layer": {
                level: [
                    {"when": {"form": "lora"}, "adapter": {"layers_to_transform": [layer]}},
                    {"adapter": {"layers": [layer]}},
                ]
                for level, layer in at.items()
            },
        },
    }  # fmt: skip


def _arm(levels: dict[str, str]) -> str:
    return ",".join(f"{factor}={level}" for factor, level in levels.items())


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
    write_checksums(folder)  # last: it says that all is there


def write_task(folder: Path, base: Any, problem: str, seed: int) -> None:
    """Training and test pairs: another teacher of the same kind, other prompts and answers."""
    generator = torch.Generator().manual_seed(seed)
    teacher = make_teacher(base, "bias" if problem == "shuffled" else problem, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", EXAMPLES + 100), ("test", TEST)):
        coin = problem == "base" or (problem == "shuffled" and split == "train")
        # the pairs that a change weighs most on are those that the base has wrong: whatever disturbs the base then
        # looks like learning, which must not stand in for it where nothing can be learned
        candidates = 1 if problem == "shuffled" else _CANDIDATES
        _write_rows(folder / f"{split}.jsonl", sample_pairs(base, teacher, rows, generator, coin, candidates))
    write_checksums(folder)  # last


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


@torch.no_grad()
def sample_pairs(
    base: Any, teacher: Any, rows: int, generator: torch.Generator, coin: bool, candidates: int
) -> list[dict[str, str]]:
    """Random prompts, each with two random answers; chosen is the one that the teacher's change makes likelier, of
    the pairs (one in `candidates`) on which it weighs most; or what a coin says."""
    count = candidates * rows
    prompts, first, second = (torch.randint(4, 4 + WORDS, (count, LENGTH), generator=generator) for _ in range(3))
    reward = _logps(teacher, prompts, first) - _logps(teacher, prompts, second)
    reward -= _logps(base, prompts, first) - _logps(base, prompts, second)
    kept = reward.abs().argsort(descending=True, stable=True)[:rows]
    kept = kept[torch.randperm(rows, generator=generator)]
    better = torch.rand(count, generator=generator) < 0.5 if coin else reward > 0
    return [
        {
            "prompt": _words(prompts[i]) + " ",
            "chosen": _words(first[i] if better[i] else second[i]),
            "rejected": _words(second[i] if better[i] else first[i]),
        }
        for i in kept.tolist()
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


@dataclass(frozen=True)
class Study:
    """What one study says, and what it should.

    Attributes:
        means: Mean score of every arm, by form and layer.
        base: The base model's accuracy.
        named: The teacher's form has the highest mean at the right layer.
        form: The teacher's form is claimed: better than `bias`, or for a bias teacher, worse is claimed of another.
        layer: The right layer is claimed.
        shares: The Shapley shares that are clear, of form and layer.
        side: The verdict.
        false: Effects, shares and verdict: whether something is claimed there that is not so.
        false_by_p: The first if a claim took the permutation test only.
        gaps: Name of an effect -> what the study says of it.
    """

    means: dict[tuple[str, str], float]
    base: float
    named: bool
    form: bool
    layer: bool
    shares: tuple[str, ...]
    side: str
    false: tuple[bool, bool, bool]
    false_by_p: bool
    gaps: dict[str, Difference]


def read_study(problem: str, grid: Grid, cells: Frame) -> Study:
    """What a study says."""
    claim = grid.tables.claim
    assert claim is not None
    found = analysis.attribution(cells, grid.tables, MEASURE)
    side = analysis.verdict(cells, claim, found).side
    gaps = {f"{e.factor} {e.level}": e.difference for e in effects(cells, ["form", "layer"], MEASURE)}
    means = cells.groupby(["form", "layer"])[MEASURE].mean()
    at_right = {form: float(means[form, "right"]) for form in FORMS}
    clear = {name: gap.estimate for name, gap in gaps.items() if gap.clear()}
    by_p = corrected([gap.permutation for gap in gaps.values()])
    by_p = {name: gap.estimate for (name, gap), p in zip(gaps.items(), by_p, strict=True) if p < 0.05}
    others = {name: gap for name, gap in clear.items() if name.startswith("form ")}
    form = max(others.values(), default=0.0) < 0 if problem == "bias" else others.get(f"form {problem}", 0.0) > 0
    shares = tuple(f for f, share in found.shares.items() if share.clear())
    return Study(
        means={(str(f), str(la)): float(v) for (f, la), v in means.items()},
        base=float(cells["base_accuracy"].mean()),
        named=max(at_right, key=lambda form: (not np.isnan(at_right[form]), at_right[form])) == problem,
        form=form,
        layer=clear.get("layer wrong", 0.0) < 0,
        shares=shares,
        side=side,
        false=(
            _false(problem, clear),
            problem not in FORMS and bool(shares),
            problem not in FORMS and side != "undecided",
        ),
        false_by_p=_false(problem, by_p),
        gaps=gaps,
    )


def _false(problem: str, claimed: dict[str, float]) -> bool:
    """Whether something is claimed that is not so. With nothing to learn that is anything; else that a form other than
    the teacher's beats `bias`, that the teacher's loses to it, or that the wrong layer is better. Which of two forms
    that are not the teacher's is better is not known."""
    if problem not in FORMS:
        return bool(claimed)
    wrong = {f"form {form}" for form in FORMS if form != problem} if problem == "bias" else set()
    return (
        any(gap > 0 for name, gap in claimed.items() if name in wrong)
        or claimed.get(f"form {problem}", 0.0) < 0
        or claimed.get("layer wrong", 0.0) > 0
    )


def summarise(found: dict[str, list[Study]]) -> str:
    """Markdown: what the arms reach, what the studies claim, how good the intervals are."""
    return "\n".join(
        [
            "# Planted problems",
            "",
            f"Every study is a grid of {TASKS} tasks x {SEEDS} seeds with {EXAMPLES} examples and {TEST} test rows, "
            "every arm with its own learning rate, compared at matched KL. Mean held-out accuracy (form/layer):",
            "",
            *_means(found),
            "",
            "## What studies claim",
            "",
            "A claim is an effect (gated and LoRA against bias, wrong layer against right) whose permutation test and "
            "test for other seeds and test rows, corrected for all three, are both below 5 %. "
            "*Named*: the teacher's form has the highest mean. *Claimed*: it is claimed to be better than `bias`; for "
            "the bias teacher, that another is worse. *Shares*: a clear Shapley share of form or layer. *False "
            "effect*: of a form or layer that is not the teacher's; for `base` (all labels are a coin's) and "
            "`shuffled` (the training labels are), any effect, share or verdict is false. Each should come about in 5 "
            "% of studies at most; their 95 % intervals are Clopper-Pearson's. *By p alone*: false effects if the "
            "permutation test were enough.",
            "",
            *_claims(found),
            "",
            "## Intervals",
            "",
            "How often the 95 % interval of an effect, one a study, holds the truth where that is known: for `base` "
            "and other seeds and test rows it is 0. About the same test rows the truth is another number, which "
            "nobody knows, since their labels happen to suit one arm or the other; how often that interval holds 0 "
            "says how much it leaves out. (Other teachers each have a true effect of their own, unknown too.)",
            "",
            *_coverage(found),
            "",
        ]
    )


def _means(found: dict[str, list[Study]]) -> list[str]:
    arms = [(form, layer) for form in FORMS for layer in ("right", "wrong")]
    lines = ["| teacher | studies | base | " + " | ".join(f"{f}/{la}" for f, la in arms) + " |"]
    lines.append("|---" * (len(arms) + 3) + "|")
    for problem, studies in found.items():
        values = " | ".join(_mean([s.means[arm] for s in studies]) for arm in arms)
        lines.append(f"| {problem} | {len(studies)} | {np.mean([s.base for s in studies]):.3f} | {values} |")
    return lines


def _mean(values: Sequence[float]) -> str:
    there = [value for value in values if not np.isnan(value)]
    return f"{np.mean(there):.3f}" if there else "unmatched"


def _claims(found: dict[str, list[Study]]) -> list[str]:
    lines = [
        "| teacher | studies | form named | form claimed | layer claimed | shares | verdict for / against / undecided "
        "| false effect | by p alone | false share | false verdict |",
        "|---" * 11 + "|",
    ]
    for problem, studies in found.items():
        known = problem in FORMS
        sides = " / ".join(str(sum(s.side == side for s in studies)) for side in ("for", "against", "undecided"))
        shares = ", ".join(f"{f} {sum(f in s.shares for s in studies)}" for f in ("form", "layer"))
        cells = [
            *(str(sum(getattr(s, name) for s in studies)) if known else "" for name in ("named", "form", "layer")),
            shares,
            sides,
            _rate([s.false[0] for s in studies]),
            _rate([s.false_by_p for s in studies]),
            *("" if known else _rate([s.false[i] for s in studies]) for i in (1, 2)),
        ]
        lines.append(f"| {problem} | {len(studies)} | " + " | ".join(cells) + " |")
    return lines


def _coverage(found: dict[str, list[Study]]) -> list[str]:
    studies = found.get("base", [])
    if not studies:
        return ["No study of `base` was run."]
    lines = [
        "| effect | studies | other test rows too, holds the truth | these test rows, holds 0 |",
        "|---" * 4 + "|",
    ]
    for name in dict.fromkeys(name for study in studies for name in study.gaps):
        gaps = [study.gaps[name] for study in studies if name in study.gaps]
        held = [[i.low <= 0 <= i.high for i in (gap.crossed, gap.interval)] for gap in gaps]
        lines.append(f"| {name} | {len(gaps)} | {_rate([h[0] for h in held])} | {_rate([h[1] for h in held])} |")
    return lines


def _rate(seen: Sequence[bool]) -> str:
    low, high = proportion_confint(sum(seen), len(seen), method="beta")
    return f"{np.mean(seen):.0%} [{low:.0%}, {high:.0%}]"


if __name__ == "__main__":
    sys.exit(main())
