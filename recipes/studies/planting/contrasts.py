"""Problems of contrast: what the chosen answers carry, what the rejected ones do, and what the teacher is.

Answers are sampled from the base with vectors added. `v` is the teacher's, `u` and `w` are random others, and every
one alone has the same KL to the base. Shapes: D width of the residual stream.
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
"""Of every planted change to the base, and of every student where it is compared, in nats per token."""
LARGEST = 512.0


@dataclass(frozen=True)
class Problem:
    """What is planted.

    Attributes:
        chosen: Changes of the model that writes the chosen answers, which are added up; "uu" is twice u.
        rejected: Changes of the model that writes the rejected ones.
        teacher: Form of the teacher's change, `vector` or `lora`.
        about: What it asks of a training, in words.
    """

    chosen: str
    rejected: str
    about: str
    teacher: str = "vector"


CONTRASTS = {
    "both": Problem("v", "", "chosen answers are the teacher's, rejected ones the base's: both ways can learn it"),
    "pair": Problem("vuu", "uu", "both answers share a nuisance, so that only their difference is the teacher's"),
    "chosen": Problem("v", "ww", "chosen answers are the teacher's, rejected ones mislead: the difference is another"),
    "lora": Problem("v", "", "the same as both, with a teacher that is a LoRA of rank one", "lora"),
    "coin": Problem("", "", "both answers are the base's: there is nothing to learn"),
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
    """Make the teacher and the data of one task. All changes get their size on the neutral text."""
    generator = torch.Generator().manual_seed(seed)
    directions = {name: torch.randn(world.width, generator=generator) for name in "vuw"}
    vectors = {name: _sized(world.vector(direction / direction.norm()), neutral, world) for name, direction in
               directions.items()}  # fmt: skip
    teacher = _sized(world.lora(seed), neutral, world) if problem.teacher == "lora" else vectors["v"]
    if problem.teacher == "lora":
        vectors["v"] = teacher
    sizes, source = world.sizes, {side: _model(getattr(problem, side), vectors, world) for side in
                                  ("chosen", "rejected")}  # fmt: skip
    # one draw of prompts for everything, so that no prompt is trained on and tested
    counts = [sizes.train, sizes.train, sizes.test, sizes.fresh]
    prompts, parts = world.prompts(sum(counts), seed), []
    for count in counts:
        parts.append(prompts[:count])
        prompts = prompts[count:]
    pairs = [
        world.rows(part, **{side: world.answers(model, part, 10 * seed + i) for i, (side, model) in
                            enumerate(source.items())})
        for part in parts[:3]
    ]  # fmt: skip
    answered = [world.rows(part, completion=world.answers(teacher, part, 10 * seed + 7)) for part in parts[2:]]
    return Planted(teacher, *pairs, *answered)


def _model(parts: str, vectors: dict[str, Any], world: World) -> Any:
    """The base with the sum of some changes; a LoRA stands alone."""
    if not parts:
        return world.model
    if len(parts) == 1:
        return vectors[parts]
    named = [dict(vectors[part].named_parameters()) for part in parts]
    vectors_ND = [next(p.detach() for name, p in of.items() if "steering_vector_v" in name) for of in named]
    return world.vector(torch.stack(vectors_ND).sum(dim=0))


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
