"""A reward that measures how far answers lie along a vector's direction, and so enters the advantage.

    score(x, y) = mean over layers l and tokens t of y of  ⟨h_lt, v_l⟩ / (‖v_l‖ ‖h_lt‖)

h are states of the frozen base model that reads the answer, so the trained adapter can raise the score by its answers
only, and not by pushing its own states along v. GRPO adds rewards by `reward_weights` and compares them within the
group; so the score enters the advantage like any reward, positive or, with a negative weight, as a penalty
(advantage modification, 2604.01476, is of this kind).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.observing import adapters_off, base_model, evaluating
from ..frozen_vectors import FrozenVectorError, read_frozen_vectors
from .errors import RolloutError
from .local import padded


class DirectionScore:
    """Mean cosine of answers with a saved vector, in the states of the base model: a reward function for TRL.

    Args:
        model: The base model, or the trained model, whose adapters are off while it reads.
        tokenizer: Its tokenizer.
        vector: Folder of a saved steering vector.
        rows: Rows of a pass.

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
        self._directions = {one.module: one.vector_D / one.vector_D.norm() for one in frozen if one.vector_D.any()}

    def __call__(self, prompts: Sequence[Any], completion_ids: Sequence[list[int]], **kwargs: Any) -> list[float]:
        """The score of every completion."""
        scores: list[float] = []
        for start in range(0, len(prompts), self.rows):
            some = slice(start, start + self.rows)
            scores += self._scores(self._token_ids(prompts[some]), completion_ids[some]).tolist()
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
        cosines_RC: list[Tensor] = []

        def note(direction_D: Tensor, module: nn.Module, args: Any, output: Any) -> None:
            h_RCD = (output[0] if isinstance(output, tuple) else output).float()
            cosines_RC.append((h_RCD @ direction_D) / h_RCD.norm(dim=-1).clamp_min(1e-12))

        with ExitStack() as stack:
            stack.enter_context(adapters_off(self.model))
            stack.enter_context(evaluating(self.model))
            for name, direction_D in self._directions.items():
                hook = partial(note, direction_D.to(device).float())
                stack.callback(base.get_submodule(name).register_forward_hook(hook).remove)
            base(input_ids=ids_RC, attention_mask=mask_RC)
        mean_RC = torch.stack(cosines_RC).mean(dim=0)
        return (mean_RC * answer_RC).sum(dim=1) / answer_RC.sum(dim=1).clamp_min(1)

    def _token_ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        if isinstance(prompts[0], str):
            return self.tokenizer(list(prompts))["input_ids"]
        return self.tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
