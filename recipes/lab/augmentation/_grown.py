"""A training set enlarged by an augmenter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.progress import Bar
from steertune.recipes.lab.similarity import NEAR, answered_texts, near_duplicates

from ._base import AugmentationError, Augmenter, Row, get_augmenter

_TURNS = 8  # attempts for each version that is needed


@dataclass(frozen=True)
class Grown:
    """A larger training set.

    Attributes:
        rows: The examples and their versions, turn after turn.
        note: How many versions were made and left out.
    """

    rows: Dataset
    note: str


def read(table: Mapping[str, Any]) -> tuple[Augmenter, int] | None:
    """Augmenter and `times` of an `[augmentation]` table; None if it is empty.

    Raises:
        AugmentationError: an unknown name or option, or `times` is not a whole number of 1 or more.
    """
    if not table:
        return None
    options = dict(table)
    name, times = options.pop("name", None), options.pop("times", 4)
    if name is None:
        raise AugmentationError("[augmentation] has no name. Set it to an augmenter.")
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise AugmentationError(f"augmentation.times={times!r} must be a whole number, 1 (nothing new) or more.")
    try:
        return get_augmenter(str(name), **options), times
    except (ValueError, TypeError) as error:
        raise AugmentationError(f"[augmentation]: {error}") from error


def grown(
    rows: Dataset,
    augmenter: Augmenter,
    times: int,
    *,
    seed: int = 0,
    model: Any = None,
    tokenizer: Any = None,
    apart: Sequence[Dataset] = (),
    near: float = NEAR,
) -> Grown:
    """Enlarge a training set `times` times.

    Args:
        rows: The examples, with a column `prompt`.
        augmenter: Makes the versions.
        times: How many times as many examples to make, counting the originals.
        seed: Seed of the augmenter.
        model: The base model, for augmenters that use it.
        tokenizer: Its tokenizer.
        apart: Rows that are measured on: versions whose text or prompt is similar to one of theirs are left out.
        near: Similarity from which on a version is left out (see `near_duplicates`).

    Raises:
        AugmentationError: there are no prompts, or fewer versions than requested.
    """
    if "prompt" not in rows.column_names:
        raise AugmentationError(f"Versions are made from prompts, but the data have only {rows.column_names}.")
    examples: list[Row] = [dict(row) for row in rows.to_list()]
    measured_on = [dict(row) for part in apart for row in part.to_list()]
    identities = [{_identity(row)} for row in examples]
    made: list[list[Row]] = [[] for _ in examples]
    left_out: Counter[str] = Counter()
    bar = Bar((times - 1) * len(examples))
    for turn in range(_TURNS * (times - 1)):
        missing = [i for i, versions in enumerate(made) if len(versions) < times - 1]
        if not missing:
            break
        versions = augmenter([examples[i] for i in missing], turn, seed, model, tokenizer)
        _check(augmenter, [examples[i] for i in missing], versions)
        near_one = _near_rows(versions, [examples[i] for i in missing], measured_on, near)
        for j, (i, version) in enumerate(zip(missing, versions, strict=True)):
            reason = _reason(version, j in near_one, identities[i])
            if reason is not None or version is None:
                left_out[str(reason)] += 1
                continue
            identities[i].add(_identity(version))
            made[i].append(version)
            bar.advance()
    _check_enough(augmenter, examples, made, times, left_out)
    turns = [versions[t] for t in range(times - 1) for versions in made]
    note = f"{len(examples)} examples became {len(examples) * times} by {type(augmenter).__name__.lower()}"
    missed = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    return Grown(Dataset.from_list([*examples, *turns]), f"{note}; left out: {missed or 'nothing'}")


def _reason(version: Row | None, near: bool, identities: set[str]) -> str | None:
    """The reason why a version is left out; None if it is kept."""
    if version is None:
        return "that fail its checks"
    if _identity(version) in identities:
        return "copies"
    return "close to rows of the evaluation" if near else None


def _identity(row: Row) -> str:
    """A row as a text that is the same for versions that differ only in white space and case."""
    return json.dumps(row, sort_keys=True).casefold().replace("\\n", " ").replace(" ", "")


def _near_rows(
    versions: Sequence[Row | None], examples: Sequence[Row], measured_on: Sequence[Row], near: float
) -> set[int]:
    """Versions whose prompt, or prompt and answer, is similar to a row that is measured on; if the example's prompt is
    already similar, as with a task's one question, only prompt and answer count."""
    prompts = [_prompt(row) for row in measured_on]
    texts = [text for row in measured_on for text in answered_texts(row)]
    alike = {i for i, _ in near_duplicates([_prompt(row) for row in examples], prompts, near)}
    existing = [(i, version) for i, version in enumerate(versions) if version is not None]
    apart = [(i, _prompt(version)) for i, version in existing if i not in alike]
    whole = [(i, text) for i, version in existing for text in answered_texts(version)]
    near_prompts = near_duplicates([text for _, text in apart], prompts, near)
    near_answers = near_duplicates([text for _, text in whole], texts, near)
    return {*(apart[k][0] for k, _ in near_prompts), *(whole[k][0] for k, _ in near_answers)}


def _prompt(row: Row) -> str:
    return plain(row["prompt"]) if "prompt" in row else ""


def _check(augmenter: Augmenter, rows: Sequence[Row], versions: Sequence[Row | None]) -> None:
    """Check the return value of an augmenter, which may be the user's."""
    name = type(augmenter).__name__
    if len(versions) != len(rows):
        raise AugmentationError(
            f"{name} returned {len(versions)} versions of {len(rows)} rows. Return one version, or None, for each row."
        )
    for row, version in zip(rows, versions, strict=True):
        if version is None:
            continue
        if not isinstance(version, dict) or set(version) != set(row):
            raise AugmentationError(f"{name} returned {version!r:.200}, not a row with keys {sorted(row)}.")
        for key, value in row.items():
            if type(version[key]) is not type(value):
                kinds = type(version[key]).__name__, type(value).__name__
                raise AugmentationError(f"{name}: {key!r} is a {kinds[0]} in a new version, but was a {kinds[1]}.")


def _check_enough(
    augmenter: Augmenter, rows: Sequence[Row], made: Sequence[Sequence[Row]], times: int, left_out: Counter[str]
) -> None:
    short = [i for i, versions in enumerate(made) if len(versions) < times - 1]
    if not short:
        return
    first = short[0]
    missed = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "none"
    prompt, turns = plain(rows[first]["prompt"]), _TURNS * (times - 1)
    raise AugmentationError(
        f"{type(augmenter).__name__} made {len(made[first])} of {times - 1} versions of {prompt!r} in {turns} turns, "
        f"and too few for {len(short)} of {len(rows)} rows (left out: {missed}). "
        "Lower augmentation.times, or loosen the augmenter's checks."
    )
