"""Do two vectors at once do what each does alone? Measured on the data of both.

On the data of each vector, four models are compared: the base, each vector alone, and both. With margins m
(log p(chosen) - log p(rejected)) and the gain g = m - m(base), averaged over held-out pairs,

    kept        = g(both) / g(alone)                 on the vector's own data
    interaction = g(both) - g(first) - g(second)     0 where the effects add up

The vectors are two adapters of one model, so any forms, layers and sites can be combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from steertune.adapters import set_strength
from steertune.recipes.ablation.statistics.paired import interval
from steertune.recipes.lab.data import load_split, load_steered
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.measures import neutral_logps, pair_margins, side_effects
from steertune.recipes.lab.processes import begin
from steertune.trainers import FrozenPrefix, scaled

FIRST, SECOND = "default", "second"
KEEPS = 0.8
"""A vector keeps its effect if at least this share of its gain remains."""
_ACTIVE = {"base": [], "first": [FIRST], "second": [SECOND], "both": [FIRST, SECOND]}


def measure(
    folders: Sequence[Path],
    data: Sequence[str],
    strengths: Sequence[float] = (1.0, 1.0),
    rows: int = 40,
    model: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Margins of the base, each vector alone and both on the data of each, and side effects on neutral text.

    Args:
        folders: Two adapters of one base model.
        data: The task of each vector.
        strengths: The strength of each vector.
        rows: Test pairs of each task.
        model: The base model; None for the one that the first adapter names.
        threads: CPU threads.

    Raises:
        ArmError: no usable adapter, adapters of different bases, no pairs, or too few.
    """
    begin(threads, only_one=True)
    parts = [_pairs(name, rows) for name in data]

    # both vectors as adapters of one model, at their strengths
    loaded: tuple[Any, Any, str] = load_steered(folders[0], model)
    steered, tokenizer, _ = loaded
    try:
        steered.load_adapter(str(folders[1]), SECOND)
        for name, strength in zip((FIRST, SECOND), strengths, strict=True):
            set_strength(steered, strength, name)
    except (ValueError, KeyError) as error:
        raise ArmError(f"{folders[1]} cannot be loaded beside {folders[0]}: {error}") from error
    steered.eval()
    # every model on both data sets and on neutral text
    prefix, margins, neutral = FrozenPrefix(warn=False), {}, {}
    for seen, active in _ACTIVE.items():
        if active:
            steered.base_model.set_adapter(active)
        with scaled(steered, 0.0) if not active else torch.no_grad(), prefix.on(steered, labels_only=True):
            margins[seen] = [pair_margins(steered, tokenizer, part, [1.0])[1.0].numpy() for part in parts]
            neutral[seen] = neutral_logps(steered, tokenizer)
    names = [folder.name for folder in folders]
    if names[0] == names[1]:
        names = [str(folder) for folder in folders]
    return {
        "names": names,
        "data": [Path(name).name for name in data],
        "strengths": [*strengths],
        "rows": rows,
        "on": [_on(i, {seen: of[i] for seen, of in margins.items()}) for i in range(2)],
        "side_effects": {seen: side_effects(neutral[seen], neutral["base"]) for seen in _ACTIVE},
    }


def summarise(result: dict[str, Any]) -> str:
    """The result in Markdown, beginning with the answer in words."""
    lines = [*_answers(result), "", "| data | model | pair accuracy | margin gain, nats |", "|---|---|---|---|"]
    called = {"base": "base", "first": result["names"][0], "second": result["names"][1], "both": "both"}
    for name, on in zip(result["data"], result["on"], strict=True):
        lines += [f"| {name} | {called[s]} | {one['accuracy']:.3f} | {one['gain']} |" for s, one in on["seen"].items()]
    lines += ["", "| model | KL to the base on neutral text | perplexity |", "|---|---|---|"]
    for seen, effects in result["side_effects"].items():
        lines.append(f"| {called[seen]} | {effects['kl']:.3f} | {effects['perplexity']:.2f} |")
    return "\n".join(lines)


def _answers(result: dict[str, Any]) -> list[str]:
    lines = []
    for i, (name, on) in enumerate(zip(result["names"], result["on"], strict=True)):
        where = f"On {result['data'][i]}"
        if not on["works"]:
            lines.append(f"{where}, {name} alone has no clear effect ({on['alone']}), so there is none to keep.  ")
            continue
        verdict = {"keeps": "the pair keeps it", "loses": "the pair loses it", "open": "it is open whether it is kept"}
        lines.append(
            f"{where}, {name} alone gains {on['alone']} nats and the pair {on['together']}, {on['kept']:.0%} of it: "
            f"{verdict[on['verdict']]} (interaction {on['interaction']}).  "
        )
    return lines


def _on(own: int, margins: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The comparison on the data of one vector.

    Args:
        own: Whose data they are: 0 for the first vector, 1 for the second.
        margins: Model -> margins of the pairs, `(pairs,)`.
    """
    gains = {seen: (values - margins["base"]).astype(float) for seen, values in margins.items()}
    alone, both = gains["first" if own == 0 else "second"], gains["both"]
    kept = interval(both - KEEPS * alone)
    verdict = "keeps" if kept.low > 0 else "loses" if kept.high < 0 else "open"
    return {
        "seen": {
            seen: {
                "accuracy": float(((np.sign(margins[seen]) + 1) / 2).mean()),
                "gain": str(interval(gains[seen])) if seen != "base" else "",
                "margins": [round(float(m), 4) for m in margins[seen]],
            }
            for seen in margins
        },
        "works": bool(interval(alone).low > 0),
        "alone": str(interval(alone)),
        "together": str(interval(both)),
        "kept": float(both.mean() / alone.mean()) if alone.mean() else float("nan"),
        "verdict": verdict,
        "interaction": str(interval(both - gains["first"] - gains["second"])),
    }


def _pairs(name: str, rows: int) -> Dataset:
    part = load_split(name, "test")
    if not {"chosen", "rejected"} <= set(part.column_names):
        raise ArmError(
            f"{name!r} must have preference pairs to measure effects on (its columns are {part.column_names})."
        )
    if not 2 <= rows <= len(part):
        raise ArmError(f"--rows must be 2 to {len(part)}, the test pairs of {name!r} (got {rows}).")
    return part.select(range(rows))
