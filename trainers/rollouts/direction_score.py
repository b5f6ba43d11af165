"""A reward that measures how far answers lie along a vector's direction, and so enters the advantage.

    score(x, y) = mean over layers l and tokens t of y of  ⟨h_lt, v_l⟩ / (‖v_l‖ ‖h_lt‖)

h are states of the frozen base model that reads the answer, so the trained adapter can raise the score only through
its answers, and not by pushing its own states along v. GRPO adds rewards by `reward_weights` and compares them within
the group; so the score enters the advantage like any reward, positive or, with a negative weight, as a penalty
(advantage modification, 2604.01476, is of this kind).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.analysis.activations import Enough, outputs_of
from ...adapters.observing import adapters_off, base_model, evaluating
from ..frozen_vectors import FrozenVectorError, read_frozen_vectors
from ..padding import padded
from .errors import RolloutError
from .local import token_ids


class DirectionScore:
    """Mean cosine of answers with a saved vector, in the states of the base model: a reward function for TRL.

    Args:
        model: The base model, or the trained model, whose adapters are disabled while it reads.
        tokenizer: Its tokenizer.
        vector: Folder of a saved steering vector.
        rows: Rows per forward pass.

    Raises:
        RolloutError: the folder holds no vector of this model.
    """

    __name__ = "direction_score"

    def __init__(self, model: nn.Module, tokenizer: Any, vector: str, rows: int = 8) -> None:
        try:
            frozen = read_frozen_vectors(vector, model)
        except FrozenVectorError as error:
            raise RolloutError(f"DirectionScore: {error}") from error
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        # layer -> the module whose states are read, and the direction
        self._directions = {one.layer: (one.module, one.vector_D) for one in frozen if one.vector_D.any()}

    def __call__(self, prompts: Sequence[Any], completion_ids: Sequence[list[int]], **kwargs: Any) -> list[float]:
        """The score of every completion."""
        scores: list[float] = []
        for start in range(0, len(prompts), self.rows):
            some = slice(start, start + self.rows)
            scores += self._scores(token_ids(prompts[some], self.tokenizer), completion_ids[some]).tolist()
        return scores

    @torch.no_grad()
    def _scores(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Tensor:
        """Scores of a few rows, `(rows,)`."""
        base: Any = base_model(self.model)
        device = base.get_input_embeddings().weight.device
        ids_RC, mask_RC = padded(
            [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)], 0, device, left=False
        )
        starts_R1 = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
        answer_RC = mask_RC.bool() & (torch.arange(ids_RC.shape[1], device=device) >= starts_R1)
        modules = {layer: base.get_submodule(name) for layer, (name, _) in self._directions.items()}
        reading = outputs_of(base, modules, ends_early=True)
        with adapters_off(self.model), evaluating(self.model), reading as states, suppress(Enough):
            base(input_ids=ids_RC, attention_mask=mask_RC)
        cosines_RC = [
            torch.cosine_similarity(states[layer].float(), direction_D.to(device).float(), dim=-1)
            for layer, (_, direction_D) in self._directions.items()
        ]
        mean_RC = torch.stack(cosines_RC).mean(dim=0)
        return (mean_RC * answer_RC).sum(dim=1) / answer_RC.sum(dim=1).clamp_min(1)
