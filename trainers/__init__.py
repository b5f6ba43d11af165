"""Trainers: drop-in subclasses of `Trainer` and of TRL's SFT, DPO, GRPO and RLOO trainers.

Each name is imported when it is first used, because TRL takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch
    from .callbacks.finite import NonFiniteError
    from .callbacks.spikes import LossSpikeError, LossSpikes
    from .checkpoints import CheckpointError, last_checkpoint
    from .context import context_length
    from .data import DataError, collator, tokenise
    from .dpo import SteeringDPOTrainer
    from .grpo import SteeringGRPOTrainer
    from .inductive_biases import Bias, BiasError, get_bias
    from .model_at import ModelAt, labelled_logits, scalable, scaled
    from .prefix import FrozenPrefix
    from .reinforcement_mixin import RewardError
    from .rloo import SteeringRLOOTrainer
    from .rollouts import DirectionScore, RolloutError, SteeredRollouts
    from .sft import SteeringSFTTrainer
    from .together import share_weights, train_together
    from .trainer import SteeringTrainer
    from .views import View, ViewError, get_view

_HOME = {
    "Batch": "batch",
    "Bias": "inductive_biases",
    "BiasError": "inductive_biases",
    "CheckpointError": "checkpoints",
    "DataError": "data",
    "DirectionScore": "rollouts",
    "FrozenPrefix": "prefix",
    "LossSpikeError": "callbacks.spikes",
    "LossSpikes": "callbacks.spikes",
    "ModelAt": "model_at",
    "NonFiniteError": "callbacks.finite",
    "RewardError": "reinforcement_mixin",
    "RolloutError": "rollouts",
    "SteeredRollouts": "rollouts",
    "SteeringDPOTrainer": "dpo",
    "SteeringGRPOTrainer": "grpo",
    "SteeringRLOOTrainer": "rloo",
    "SteeringSFTTrainer": "sft",
    "SteeringTrainer": "trainer",
    "View": "views",
    "ViewError": "views",
    "collator": "data",
    "context_length": "context",
    "get_bias": "inductive_biases",
    "get_view": "views",
    "labelled_logits": "model_at",
    "last_checkpoint": "checkpoints",
    "scalable": "model_at",
    "scaled": "model_at",
    "share_weights": "together",
    "tokenise": "data",
    "train_together": "together",
}
__all__ = [
    "Batch",
    "Bias",
    "BiasError",
    "CheckpointError",
    "DataError",
    "DirectionScore",
    "FrozenPrefix",
    "LossSpikeError",
    "LossSpikes",
    "ModelAt",
    "NonFiniteError",
    "RewardError",
    "RolloutError",
    "SteeredRollouts",
    "SteeringDPOTrainer",
    "SteeringGRPOTrainer",
    "SteeringRLOOTrainer",
    "SteeringSFTTrainer",
    "SteeringTrainer",
    "View",
    "ViewError",
    "collator",
    "context_length",
    "get_bias",
    "get_view",
    "labelled_logits",
    "last_checkpoint",
    "scalable",
    "scaled",
    "share_weights",
    "tokenise",
    "train_together",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
