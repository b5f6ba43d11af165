"""The tokens of every example's views, found by the example's own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._batch import Batch
from .._data import tokenise
from .._host import on_host, sent
from ._base import Row, View, ViewError

if TYPE_CHECKING:
    from ..prefix import FrozenPrefix
    from ..prefix.cached_states import CachedReference


class Views:
    """What a loss sees when it asks for a view of a batch.

    Args:
        views: By the name that the loss asks for.
        tokenizer: Its chat template writes the views.
        context: Tokens that the model can read; None: unknown.
    """

    def __init__(
        self, views: Mapping[str, View], tokenizer: PreTrainedTokenizerBase, context: int | None = None
    ) -> None:
        self.views, self.tokenizer, self.context = dict(views), tokenizer, context
        self._rows: dict[tuple[str, bytes], tuple[list[int], int]] = {}  # tokens, and where the answer starts
        self.memos: dict[str, CachedReference | None] = {}
        """What is known of teachers' outputs already, by view."""

    def add(self, rows: Dataset, tokenised: Dataset, training: Dataset | None = None) -> None:
        """Make every view of a data set.

        Args:
            rows: The data in one of TRL's formats.
            tokenised: The same rows as the trainer reads them.
            training: Of evaluation rows, the rows that are trained on.

        Raises:
            ViewError: rows that were packed or dropped, a view that the chat template refuses or leaves out, one
                longer than the context, one whose answers have other tokens than the example's, or one that shows
                evaluation rows in front of others.
        """
        if len(rows) != len(tokenised):
            raise ViewError(f"{len(rows)} rows became {len(tokenised)}: views need packing=False, and every row kept.")
        plain = _with_prompts(rows)
        for name, view in self.views.items():
            shown = view if training is None else view.for_evaluation(_with_prompts(training), plain)
            seen = self._tokenised(name, shown(plain))
            same = view.same_answers and view.teacher is None and bool(plain)
            for i, (own, other) in enumerate(zip(tokenised, seen, strict=True)):
                sides = _sides(dict(own)), _sides(dict(other))
                self._keep(name, view, i, *sides)
                same = same and [ids for ids, _ in sides[0]] == [ids for ids, _ in sides[1]]
            if same:
                raise ViewError(
                    f"View {name!r} shows every row as it is, so that nothing can be learnt from it: the chat "
                    f"template leaves out what {view} adds (a system message, say)."
                )

    def _tokenised(self, name: str, rows: Sequence[Row]) -> Dataset:
        try:
            return tokenise(Dataset.from_list([dict(row) for row in rows]), self.tokenizer)
        except TemplateError as error:
            raise ViewError(
                f"View {name!r}: the chat template refuses it ({error}). An instruction can stand in the user's "
                "message: where='before' or 'after'."
            ) from error

    def remember(self, prefix: FrozenPrefix) -> None:
        """Keep what teachers say in a memo."""
        teachers = {name: view.teacher for name, view in self.views.items()}
        self.memos = {name: prefix.reference(t, trained=False) for name, t in teachers.items() if t is not None}

    def of(self, name: str, batch: Batch) -> Batch:
        """A view of a batch, padded on the right. Of pairs too unless the view has answers of its own.

        Raises:
            ViewError: no such view, or a row that was not among the data (cut to max_length, say).
        """
        if name not in self.views:
            raise ViewError(f"The loss asks for view {name!r}, the trainer has {sorted(self.views)}: give views=.")
        pairs = batch.pairs and self.views[name].same_answers
        batch = batch if pairs or not batch.pairs else batch.chosen
        mask = batch.inputs.get("attention_mask")
        real = None if mask is None else on_host(mask).bool()
        found = []
        for i, ids in enumerate(on_host(batch.inputs["input_ids"])):
            own = ids if real is None else ids[real[i]]
            known = self._rows.get((name, _key(own.tolist())))
            if known is None:
                raise ViewError(f"A row has no view {name!r}: it was cut to max_length, or added after the start.")
            found.append(known)
        return _padded(found, pairs, batch.labels.device)

    def _keep(self, name: str, view: View, row: int, own: Sequence[tuple[list[int], int]], other: Any) -> None:
        for (ids, start), (seen, first) in zip(own, other if view.same_answers else other[:1] * len(own), strict=True):
            if self.context is not None and len(seen) > self.context:
                raise ViewError(
                    f"View {name!r} of row {row} has {len(seen)} tokens, the model reads {self.context}: fewer "
                    "demonstrations, or a shorter instruction."
                )
            if view.same_answers and start >= 0 and seen[first:] != ids[start:]:
                raise ViewError(
                    f"View {name!r} of row {row}: the answer has other tokens behind the new prompt than behind its "
                    "own. End prompts the same way (with a space, or as conversations)."
                )
            self._rows.setdefault((name, _key(ids)), (seen, first))


def _with_prompts(rows: Dataset) -> list[Any]:
    """Rows, of implicit prompts with these."""
    if "prompt" not in rows.column_names and "chosen" in rows.column_names:
        from trl.data_utils import extract_prompt

        rows = rows.map(extract_prompt)
    return rows.to_list()


def _sides(row: Mapping[str, Any]) -> list[tuple[list[int], int]]:
    """Tokens of a row's answers with their prompt, and where the answer starts (-1: unknown)."""
    if "prompt_ids" in row:
        prompt = list(row["prompt_ids"])
        sides = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]
        return [([*prompt, *row[side]], len(prompt)) for side in sides]
    ids = list(row["input_ids"])
    if "completion_mask" in row:
        return [(ids, list(row["completion_mask"]).index(1))]
    if "labels" in row:
        return [(ids, next((i for i, label in enumerate(row["labels"]) if label != -100), len(ids)))]
    return [(ids, -1)]


def _key(ids: Sequence[int]) -> bytes:
    return b",".join(str(i).encode() for i in ids)


def _padded(rows: Sequence[tuple[list[int], int]], pairs: bool, device: torch.device) -> Batch:
    width = max(len(ids) for ids, _ in rows)

    def filled(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return sent(torch.tensor([[*value, *[fill] * (width - len(value))] for value in values]), device)

    ids, mask = filled([ids for ids, _ in rows], 0), filled([[1] * len(ids) for ids, _ in rows], 0)
    labels = filled([[-100] * start + ids[start:] for ids, start in rows], -100)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, pairs)
