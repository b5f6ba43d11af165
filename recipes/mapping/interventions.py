"""One vector per layer, all with the same KL to the base; random directions as controls; the effect of sets of
them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from steertune.adapters.exports import adapter_of
from steertune.recipes.ablation.kl_search import strengths_at
from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.mapping.effects import Set, Values
from steertune.trainers import share_weights

LARGEST = 64.0
"""The largest strength that is tried to reach the KL, relative to the given vector."""


@dataclass(frozen=True)
class Interventions:
    """Unit vectors: each alone has the same KL to the base on neutral text.

    Attributes:
        vectors: Layer -> vector, `(d,)`.
        strengths: Layer -> its length, relative to the given vector.
    """

    vectors: Mapping[int, Tensor]
    strengths: Mapping[int, float]

    @property
    def layers(self) -> list[int]:
        """The layers, from below."""
        return sorted(self.vectors)


def strength_at(base: Any, held_out: HeldOut, vectors: Mapping[int, Tensor], kl: float) -> float:
    """The strength at which vectors together have this KL.

    Args:
        base: The base model.
        held_out: Its `matching` rows are used.
        vectors: Layer -> vector, `(d,)`.
        kl: KL to the base, in nats per token.

    Raises:
        ArmError: no strength reaches it.
    """
    model = adapter_of(share_weights(base), vectors).eval()
    with held_out.remember(model):
        [point], _ = strengths_at(model, held_out, [kl], LARGEST)
    if not point.reached:
        raise ArmError(
            f"The vector at layer {', '.join(map(str, sorted(vectors)))} reaches a KL of {point.kl:.2g} at most, not "
            f"{kl:g}. Use a smaller --kl, or other layers."
        )
    return point.strength


def margins(base: Any, held_out: HeldOut, vectors: Mapping[int, Tensor], of: Set) -> Values:
    """Margins of the test pairs with these vectors added or subtracted, `(pairs,)`, in nats per token."""
    if not of:
        observed = evaluate(held_out.model, held_out, ["margin_per_token"])
    else:
        added = {layer: sign * vectors[layer] for layer, sign in of}
        observed = evaluate(adapter_of(share_weights(base), added).eval(), held_out, ["margin_per_token"])
    return np.asarray(Seen(observed["1"])["margin_per_token"], dtype=float)


def sets_to_measure(layers: Sequence[int]) -> tuple[list[Set], list[Set]]:
    """The sets that a map measures.

    Returns:
        The sets of vectors (none, each alone with both signs, all pairs), and those of controls.
    """
    pairs: list[Set] = [frozenset({(a, 1), (b, 1)}) for a, b in itertools.combinations(layers, 2)]
    added: list[Set] = [frozenset({(layer, 1)}) for layer in layers]
    subtracted: list[Set] = [frozenset({(layer, -1)}) for layer in layers]
    return [frozenset(), *added, *subtracted, *pairs], [frozenset(), *added, *pairs]


def random_sets(layers: Sequence[int], count: int, seed: int) -> list[Set]:
    """Different sets of three to five layers with random signs, which the map has to predict.

    Raises:
        ArmError: there are not that many.
    """
    sizes = [size for size in (3, 4, 5) if size <= len(layers)]
    if count > sum(math.comb(len(layers), size) * 2**size for size in sizes):
        raise ArmError(
            f"--layers: {len(layers)} layers have no {count} different sets of 3 to 5. Give more layers, or fewer "
            "--combinations."
        )
    generator, sets = np.random.default_rng(seed), dict[Set, None]()
    while len(sets) < count:
        chosen = generator.choice(layers, size=generator.choice(sizes), replace=False)
        sets[frozenset((int(layer), int(generator.choice([1, -1]))) for layer in chosen)] = None
    return list(sets)
