"""Completions at several strengths of a given vector, for a GRPO loss of the adapter alone.

A vector can give exploration to reinforcement learning: under it the model shows a behaviour that it would hardly ever
show by itself, the reward finds it, and the adapter learns to show it without the vector. Of the G completions of a
prompt, completion i is sampled from the model with its adapter and `s[i mod n] v`, for strengths
s[0..n-1]. Rewards are compared within the group as always. With π the model with only its adapter, and μ the one
that token t was sampled from, GRPO's clipped ratio is

    r_t = π(y_t | x, y_<t) / μ(y_t | x, y_<t).

This is our reading of VSPO (2605.15604), of which only the abstract was available.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...adapters import SteeringVectorConfig, steering_layers
from ...adapters.blocks import find_blocks
from ...adapters.exports import ExportError, constant_vectors
from ...adapters.observing import base_model
from ..frozen_vectors import FrozenVectorError, read_frozen_vectors
from .engine import Completion, Engine, Request, Sampling
from .errors import RolloutError
from .local import TransformersEngine, token_ids


class SteeredRollouts:
    """Samples completions at several strengths of a saved vector; a `rollout_func` of `SteeringGRPOTrainer`.

    Evaluations are at strength 0. Reward functions get each completion's strength as `strength`.

    Args:
        vector: Folder of a saved steering vector. None: only the trained vector is used, which makes sense with an
            `engine`.
        strengths: The strengths. A group has equally many completions at each, so `num_generations` must be a
            multiple of their number.
        engine: Samples the completions from the base model and the vectors in each request; the trained adapter must
            then be a constant vector. None: the trained model itself samples them, with any adapter.

    Raises:
        ValueError: the strengths are empty or not finite, or have no effect.
    """

    def __init__(
        self, vector: str | None = None, strengths: Sequence[float] = (0.0, 1.0), engine: Engine | None = None
    ) -> None:
        if not strengths or not all(map(math.isfinite, strengths)):
            raise ValueError(f"strengths={list(strengths)} must be finite numbers, at least one.")
        if vector is None and engine is None:
            raise ValueError("vector=None with engine=None changes nothing. Give the folder of a saved vector.")
        if vector is not None and not any(strengths):
            raise ValueError(f"strengths={list(strengths)} are all 0, so the vector would change nothing.")
        self.vector, self.engine = vector, engine
        self.strengths = tuple(map(float, strengths)) if vector is not None else (0.0,)
        self._given: dict[int, Tensor] = {}
        self._trainer: Any = None

    def start(self, trainer: Any) -> None:
        """Read the vector, and check that it and this way of sampling work with the trainer.

        Raises:
            RolloutError: they do not.
        """
        groups = trainer.num_generations
        if groups % len(self.strengths):
            raise RolloutError(
                f"strengths={list(self.strengths)} has {len(self.strengths)} values, which do not divide "
                f"num_generations={groups}. Every group must have equally many completions at each strength."
            )
        if trainer.is_fsdp_enabled or getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3:
            raise RolloutError("SteeredRollouts samples with whole weights, which FSDP and ZeRO-3 shard. Use DDP.")
        if self.vector is not None:
            try:
                frozen = read_frozen_vectors(self.vector, trainer.model)
            except FrozenVectorError as error:
                raise RolloutError(f"SteeredRollouts: {error}") from error
            blocks = {name for name, _ in find_blocks(base_model(trainer.model))}
            if others := [one.module for one in frozen if one.module not in blocks]:
                raise RolloutError(
                    f"SteeredRollouts: {self.vector} steers {others[0]}, but completions are only sampled with "
                    "vectors at the outputs of blocks. Use a vector of site='block'."
                )
            self._given = {one.layer: one.vector_D.float().cpu() for one in frozen}
        if self.engine is not None:
            self._trained(trainer)
        self._trainer = trainer

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """The completions of this process's prompts, in the format of TRL's `rollout_func`.

        Raises:
            RolloutError: the trainer is not the `SteeringGRPOTrainer` that this object was given to.
        """
        if trainer is not self._trainer:
            raise RolloutError(
                f"{type(trainer).__name__} would take the completions for its own. Use SteeringGRPOTrainer, and new "
                "SteeredRollouts for every trainer."
            )
        template = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
        ids = token_ids(prompts, trainer.processing_class, **template)
        strengths = self._strengths(len(ids), trainer)
        trained = {} if self.engine is None else self._trained(trainer)
        requests = [
            Request(row, _sum(trained, {layer: strength * v_D for layer, v_D in self._given.items() if strength}))
            for row, strength in zip(ids, strengths, strict=True)
        ]
        completions = self._sample(requests, trainer)
        return {
            "prompt_ids": ids,
            "completion_ids": [completion.tokens for completion in completions],
            "logprobs": [completion.logps for completion in completions],
            "strength": strengths,
        }

    def _strengths(self, rows: int, trainer: Any) -> list[float]:
        """The strength of every row. The strengths alternate within a group, which may span several processes."""
        if not trainer.model.training:
            return [0.0] * rows
        first = trainer.accelerator.process_index * rows
        return [self.strengths[i % trainer.num_generations % len(self.strengths)] for i in range(first, first + rows)]

    def _sample(self, requests: Sequence[Request], trainer: Any) -> list[Completion]:
        sampling = _sampling(trainer)
        if self.engine is not None:
            return self.engine(requests, sampling)
        from trl.models import unwrap_model_for_generation

        kwargs = trainer.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=kwargs,
        ) as unwrapped:
            model: Any = unwrapped
            return TransformersEngine(model, trainer.args.per_device_train_batch_size)(requests, sampling)

    def _trained(self, trainer: Any) -> dict[int, Tensor]:
        """The current values of the trained vectors.

        Raises:
            RolloutError: the adapter is not a constant vector.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        try:
            vectors = constant_vectors(model)
            if vectors.site != "block":
                raise ExportError(f"site={vectors.site!r}: an engine adds to the outputs of blocks.")
            return vectors.by_layer
        except ExportError as error:
            if _untrained(model):
                return {}
            raise RolloutError(
                f"engine={type(self.engine).__name__} takes only vectors with a request. {error}"
            ) from error


def _untrained(model: Any) -> bool:
    """Whether the adapter is a vector that is still zero, which an export refuses."""
    configs = [*model.peft_config.values()]
    vectors = all(isinstance(config, SteeringVectorConfig) and config.form == "bias" for config in configs)
    return vectors and not any(bool(p.any()) for layer in steering_layers(model) for p in layer.parameters())


def _sum(first: dict[int, Tensor], second: dict[int, Tensor]) -> dict[int, Tensor]:
    """Layer -> the sum of both vectors there."""
    layers = {**first, **second}
    return {layer: sum((v[layer] for v in (first, second) if layer in v), start=0 * layers[layer]) for layer in layers}


def _sampling(trainer: Any) -> Sampling:
    config = trainer.generation_config
    ends = config.eos_token_id
    return Sampling(
        max_new_tokens=trainer.max_completion_length,
        eos_token_id=list(ends) if isinstance(ends, list | tuple | set) else [ends],
        pad_token_id=config.pad_token_id,
        temperature=trainer.temperature,
        top_p=trainer.top_p,
        top_k=trainer.top_k,
        min_p=trainer.min_p,
        repetition_penalty=trainer.repetition_penalty,
        more=trainer.args.generation_kwargs or {},
    )
