"""What is planted: what the chosen answers carry, what the rejected ones do, and what the teacher is.

Answers are sampled from the base with vectors added. `v` is the teacher's, `u` and `w` are other random vectors, and
each of them alone has the same KL to the base. Shapes: D width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from steertune.recipes.ablation.kl_search import strengths_at
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.studies.planting.worlds import World

KL = 0.3
"""KL to the base of every planted change, and of every student when it is compared, in nats per token."""
LARGEST = 512.0
_SPARSE = 16  # a sparse teacher changes one in this many coordinates
_FEW = 16  # pairs of a problem whose arms could gain from a start or from versions
ALL_FACTORS = ("contrast", "layer", "form", "layers", "norm", "optimiser", "sites", "start", "loss")
"""Every factor whose arms learn from the same pairs."""


@dataclass(frozen=True)
class Problem:
    """What is planted.

    Attributes:
        seed: Teachers and data of its studies are drawn from 1000 times this number on.
        chosen: Changes of the model that writes the chosen answers, which are added up; "uu" is twice u, a capital
            letter is the opposite.
        rejected: Changes of the model that writes the rejected ones.
        about: What is planted, in words.
        teacher: Kind of the teacher's change; see `_change`.
        factors: What is compared (`COMPARISONS` in `students.py`).
        opposed: Changes of the model that writes other rejected answers, for the factor `rejected`.
        versions: Changes of the model that writes other chosen answers, for the factor `augmentation`.
        train: How many training pairs there are at most; None: as many as the size of the studies says.
        nothing: Whether a coin chose the answers, so that no arm is better by a measure of pairs.
    """

    seed: int
    chosen: str
    rejected: str
    about: str
    teacher: str = "vector"
    factors: tuple[str, ...] = ("contrast", "layer", "form")
    opposed: str = ""
    versions: str = ""
    train: int | None = None
    nothing: bool = False


PLANTS = {
    # contrast: does the pair carry what the chosen answer lacks, or the other way round?
    "both": Problem(1, "v", "", "chosen answers are the teacher's, rejected ones the base's: both ways can learn it"),
    "pair": Problem(2, "vuu", "uu", "both answers share a nuisance, so that only their difference is the teacher's"),
    "chosen": Problem(
        3, "v", "ww", "chosen answers are the teacher's, rejected ones mislead: the difference is another"
    ),
    "lora": Problem(4, "v", "", "the same as both, with a teacher that is a LoRA of rank one", "lora"),
    "coin": Problem(
        5, "", "", "both answers are the base's: there is nothing to learn", factors=("contrast",), nothing=True
    ),
    # the other factors: the teacher of `plain` has the first level of each, those below have the second of one. LoRA's
    # sites have no teacher: on the tiny model, what attention writes changes too little at any strength
    "plain": Problem(
        6,
        "v",
        "",
        "the teacher is one free vector at one layer; other rejected answers show its opposite",
        factors=("layers", "norm", "optimiser", "rejected"),
        opposed="V",
    ),
    "spread": Problem(7, "v", "", "the teacher is a vector at every layer", "spread", ("layers",)),
    "preserve": Problem(8, "v", "", "the teacher keeps the length of states", "preserve", ("norm",)),
    "sparse": Problem(
        9, "v", "", "the teacher changes one of 16 coordinates, those far from zero", "sparse", ("optimiser",)
    ),
    "opposite": Problem(
        10,
        "v",
        "",
        "rejected answers that show the teacher's opposite mislead as well",
        factors=("rejected",),
        opposed="Vww",
    ),
    "nothing": Problem(
        13, "", "", "both answers are the base's, and every factor is compared", factors=ALL_FACTORS, nothing=True
    ),
    # with few pairs: a start from their mean difference and further versions of the chosen answers help, or mislead
    "few": Problem(
        14,
        "v",
        "",
        f"as both, with {_FEW} pairs at most; versions of the chosen answers are the teacher's",
        factors=("start", "loss", "augmentation"),
        versions="v",
        train=_FEW,
    ),
    "misled": Problem(
        15,
        "v",
        "ww",
        f"as chosen, with {_FEW} pairs at most; versions of the chosen answers mislead, too",
        factors=("start", "loss", "augmentation"),
        versions="vww",
        train=_FEW,
    ),
}
"""The problems by name."""


@dataclass(frozen=True)
class Planted:
    """One task of a problem.

    Attributes:
        teacher: The model that students should become.
        train: Training pairs.
        again: Training pairs of a second draw, for the twins of arms.
        test: Test pairs, of the same distribution.
        asked: Test prompts with answers of the teacher.
        fresh: Other prompts with answers of the teacher, for the truth.
    """

    teacher: Any
    train: Dataset
    again: Dataset
    test: Dataset
    asked: Dataset
    fresh: Dataset


def plant(problem: Problem, world: World, seed: int, neutral: HeldOut) -> Planted:
    """Make the teacher and the data of one task. All changes are scaled on the neutral text."""
    generator = torch.Generator().manual_seed(seed)
    directions = {name: torch.randn(world.width, generator=generator) for name in "vuw"}
    written = f"{problem.chosen}{problem.rejected}{problem.opposed}{problem.versions}"
    used = written.lower() + ("v" if problem.teacher == "vector" else "")
    vectors = {name: _sized(world.vector(direction / direction.norm()), neutral, world) for name, direction in
               directions.items() if name in used}  # fmt: skip
    if problem.teacher != "vector":
        vectors["v"] = _sized(_change(problem.teacher, world, seed, generator), neutral, world)
    sides = {"chosen": problem.chosen, "rejected": problem.rejected}
    sides |= {"opposed": problem.opposed} if problem.opposed else {}
    sides |= {"version": problem.versions} if problem.versions else {}
    writers = {side: _model(parts, vectors, world) for side, parts in sides.items()}
    # one draw of prompts for everything, so that no prompt is both trained on and tested
    sizes = world.sizes
    counts = [sizes.train, sizes.train, sizes.test, sizes.fresh]
    prompts, parts = world.prompts(sum(counts), seed), []
    for count in counts:
        parts.append(prompts[:count])
        prompts = prompts[count:]
    pairs = [
        world.rows(part, **{side: world.answers(model, part, 10 * seed + i) for i, (side, model) in
                            enumerate(writers.items())})
        for part in parts[:3]
    ]  # fmt: skip
    if problem.train is not None:
        pairs[:2] = [rows.select(range(min(problem.train, len(rows)))) for rows in pairs[:2]]
    teacher = vectors["v"]
    answered = [world.rows(part, completion=world.answers(teacher, part, 10 * seed + 7)) for part in parts[2:]]
    return Planted(teacher, *pairs, *answered)


def _change(kind: str, world: World, seed: int, generator: torch.Generator) -> Any:
    """The base with a random change of a kind, not scaled yet."""
    direction_D = torch.randn(world.width, generator=generator)
    if kind == "spread":
        depth = world.model.config.num_hidden_layers
        return world.vector(torch.randn(depth, world.width, generator=generator), layers="all")
    if kind == "preserve":
        return world.vector(direction_D / direction_D.norm(), norm="preserve")
    if kind == "sparse":
        largest = direction_D.abs().topk(world.width // _SPARSE).indices
        return world.vector(torch.zeros(world.width).index_copy(0, largest, direction_D[largest]))
    return world.lora(seed, ["down_proj"])


def _model(parts: str, vectors: dict[str, Any], world: World) -> Any:
    """The base with the sum of some changes; a change that is not a plain vector can only be used alone."""
    if not parts:
        return world.model
    if parts in vectors:
        return vectors[parts]
    named = [dict(vectors[part.lower()].named_parameters()) for part in parts]
    vectors_ND = [next(p.detach() for name, p in of.items() if "steering_vector_v" in name) for of in named]
    signs_N1 = torch.tensor([[-1.0 if part.isupper() else 1.0] for part in parts])
    return world.vector((signs_N1 * torch.stack(vectors_ND)).sum(dim=0))


def _sized(model: Any, neutral: HeldOut, world: World) -> Any:
    """The model with its change scaled to `KL`.

    Raises:
        ValueError: no strength has this KL.
    """
    [point], _ = strengths_at(model, neutral, [KL], LARGEST, world.batch)
    if not point.reached:
        raise ValueError(f"A planted change reaches KL {point.kl:.2f} of {KL}: it is too weak at any strength.")
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "steering_vector_v" in name:
            parameter.data *= point.strength
    return model
