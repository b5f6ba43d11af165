"""The tokens of every example's views, looked up by the example's own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..batch import Batch
from ..data import DataError, tokenise
from ..host_copies import on_host, sent
from ..prefix import FrozenPrefix
from ..prefix.cached_states import CachedReference
from ._base import Row, View, ViewError

Answer = tuple[list[int], int]
"""Tokens of a row's prompt with one of its answers, and where the answer starts (-1: unknown)."""


class Views:
    """The views of batches that a loss asks for.

    Args:
        views: The views, by the name that the loss calls `at` with.
        tokenizer: The tokenizer whose chat template formats them.
        context: Context length of the model; None if unknown.
    """

    def __init__(
        self, views: Mapping[str, View], tokenizer: PreTrainedTokenizerBase, context: int | None = None
    ) -> None:
        self.views, self.tokenizer, self.context = dict(views), tokenizer, context
        self._answers: dict[tuple[str, bytes], Answer] = {}  # name of the view, tokens of the row -> its view
        self.memos: dict[str, CachedReference | None] = {}  # cached outputs of teachers, by view

    def add(self, rows: Dataset, tokenised: Dataset, training: Dataset | None = None) -> None:
        """Make every view of a data set.

        Args:
            rows: The data in one of TRL's formats.
            tokenised: The same rows as the trainer reads them.
            training: The training rows, if `rows` are evaluation rows.

        Raises:
            ViewError: rows were packed or dropped; the chat template refuses or drops what a view adds; a view is
                longer than the context; its answers have other tokens than the example's; or it shows evaluation rows
                as demonstrations.
        """
        if len(rows) != len(tokenised):
            raise ViewError(
                f"{len(rows)} rows became {len(tokenised)}, but views need every row. Set packing=False, and raise "
                "max_length or remove the rows whose prompts fill it."
            )
        plain = _with_prompts(rows)
        for name, view in self.views.items():
            make = view if training is None else view.for_evaluation(_with_prompts(training), plain)
            viewed = self._tokenised(name, make(plain))
            unchanged = view.same_answers and view.teacher is None and bool(plain)
            for i, (row, viewed_row) in enumerate(zip(tokenised, viewed, strict=True)):
                answers, viewed_answers = _answers_of(dict(row)), _answers_of(dict(viewed_row))
                self._keep(name, view, i, answers, viewed_answers)
                unchanged = unchanged and [ids for ids, _ in answers] == [ids for ids, _ in viewed_answers]
            if unchanged:
                raise ViewError(
                    f"View {name!r} shows every row unchanged, so the loss cannot learn from it: the chat "
                    f"template drops what {view} adds (a system message, say)."
                )

    def _tokenised(self, name: str, rows: Sequence[Row]) -> Dataset:
        try:
            return tokenise(Dataset.from_list([dict(row) for row in rows]), self.tokenizer)
        except DataError as error:
            if not isinstance(error.__cause__, TemplateError):
                raise
            raise ViewError(
                f"View {name!r}: the chat template refuses it ({error.__cause__}). Put an instruction into the user's "
                "message instead: where='before' or 'after'."
            ) from error

    def remember(self, prefix: FrozenPrefix) -> None:
        """Cache the outputs of teachers."""
        teachers = {name: view.teacher for name, view in self.views.items()}
        self.memos = {name: prefix.reference(t, trained=False) for name, t in teachers.items() if t is not None}

    def of(self, name: str, batch: Batch) -> Batch:
        """The view of a batch, padded on the right; for pairs only the chosen rows, if the view has its own answers.

        Raises:
            ViewError: the view does not exist, or a row was not among the data (it was cut to max_length, say).
        """
        if name not in self.views:
            raise ViewError(f"The loss asks for view {name!r}, but the trainer has {sorted(self.views)}. Give views=.")
        pairs = batch.pairs and self.views[name].same_answers
        batch = batch if pairs or not batch.pairs else batch.chosen
        mask = batch.inputs.get("attention_mask")
        real = None if mask is None else on_host(mask).bool()
        answers = []
        for i, ids in enumerate(on_host(batch.inputs["input_ids"])):
            tokens = ids if real is None else ids[real[i]]
            answer = self._answers.get((name, _key(tokens.tolist())))
            if answer is None:
                raise ViewError(
                    f"A row has no view {name!r}: it was cut to max_length, or is not among the rows that the trainer "
                    "was made with. Raise max_length, or give the rows to the trainer as eval_dataset=."
                )
            answers.append(answer)
        return _padded(answers, pairs, batch.labels.device)

    def _keep(self, name: str, view: View, row: int, answers: list[Answer], viewed: list[Answer]) -> None:
        """Store the view of each answer of a row."""
        viewed = viewed if view.same_answers else viewed[:1] * len(answers)
        for (ids, start), (viewed_ids, viewed_start) in zip(answers, viewed, strict=True):
            if self.context is not None and len(viewed_ids) > self.context:
                raise ViewError(
                    f"View {name!r} of row {row} has {len(viewed_ids)} tokens, but the model reads only "
                    f"{self.context}. Give fewer demonstrations, or a shorter instruction."
                )
            if view.same_answers and start >= 0 and viewed_ids[viewed_start:] != ids[start:]:
                raise ViewError(
                    f"View {name!r} of row {row}: the answer has other tokens after the new prompt than after the "
                    "original one. End prompts the same way (with a space, or as conversations)."
                )
            self._answers.setdefault((name, _key(ids)), (viewed_ids, viewed_start))


def _with_prompts(rows: Dataset) -> list[Any]:
    """Rows as dictionaries, with implicit prompts made explicit."""
    if "prompt" not in rows.column_names and "chosen" in rows.column_names:
        from trl.data_utils import extract_prompt

        rows = rows.map(extract_prompt)
    return rows.to_list()


def _answers_of(row: Mapping[str, Any]) -> list[Answer]:
    """The answers of a tokenised row."""
    if "prompt_ids" in row:
        prompt = list(row["prompt_ids"])
        columns = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]
        return [([*prompt, *row[column]], len(prompt)) for column in columns]
    ids = list(row["input_ids"])
    if "completion_mask" in row:
        return [(ids, list(row["completion_mask"]).index(1))]
    if "labels" in row:
        return [(ids, next((i for i, label in enumerate(row["labels"]) if label != -100), len(ids)))]
    return [(ids, -1)]


def _key(ids: Sequence[int]) -> bytes:
    return b",".join(str(i).encode() for i in ids)


def _padded(answers: Sequence[Answer], pairs: bool, device: torch.device) -> Batch:
    """Batch answers after their prompts, `(rows, tokens)`; prompt tokens have label -100."""
    width = max(len(ids) for ids, _ in answers)

    def filled(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return sent(torch.tensor([[*value, *[fill] * (width - len(value))] for value in values]), device)

    ids, mask = filled([ids for ids, _ in answers], 0), filled([[1] * len(ids) for ids, _ in answers], 0)
    labels = filled([[-100] * start + ids[start:] for ids, start in answers], -100)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, pairs)
