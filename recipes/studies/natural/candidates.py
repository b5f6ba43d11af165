"""Candidates for the default arm."""

from __future__ import annotations

from typing import Any

from steertune.recipes.lab.arm_files import merge_tables, read_tables


def _like_dpo(**patch: Any) -> dict[str, Any]:
    return merge_tables(read_tables("vector_dpo"), patch)


def _like_sft(**patch: Any) -> dict[str, Any]:
    return merge_tables(read_tables("vector_sft"), patch)


def _by_trl(loss_types: list[str], **trainer: Any) -> dict[str, Any]:
    return _like_dpo(loss={"name": "upstream"}, trainer={"loss_type": loss_types, "beta": 0.1, **trainer})


CANDIDATES: dict[str, dict[str, Any]] = {
    "vector_sft": _like_sft(),
    "vector_sft + neutral_kl": _like_sft(loss={"name": "cross_entropy", "neutral_kl": 0.5}),
    "vector_sft by unlikelihood": _like_sft(loss={"name": "unlikelihood"}),
    "cross_entropy 1e-3": _like_dpo(loss={"name": "cross_entropy"}, trainer={"learning_rate": 1e-3}),
    "cross_entropy 2e-3": _like_dpo(loss={"name": "cross_entropy"}, trainer={"learning_rate": 2e-3}),
    "vector_dpo": _like_dpo(),
    "dpo + cross_entropy 2e-3": _by_trl(["sigmoid", "sft"], learning_rate=2e-3, lr_scheduler_type="linear"),
    "apo_zero": _by_trl(["apo_zero"]),
    **{loss: _like_dpo(loss={"name": loss}) for loss in ("simpo", "ipo", "bipo")},
}
"""Name -> the arm's tables: one vector at half the depth, 16 steps. Those like `vector_dpo` take 4 pairs per step at a
constant rate of 4e-4, unless another is named; those like `vector_sft` take 8 at a rate that falls from 2e-3 to 0."""
