"""How it is trained: drop-in subclasses of `Trainer`, `SFTTrainer` and `DPOTrainer`.

The classes are imported when they are first asked for: TRL takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._at import ModelAt, labelled_logits, scalable, scaled
    from ._batch import Batch
    from ._data import DataError, collator, tokenise
    from ._guard import NonFiniteError
    from ._resume import CheckpointError, last_checkpoint
    from .biases import Bias, BiasError, get_bias
    from .dpo import SteeringDPOTrainer
    from .prefix import FrozenPrefix
    from .sft import SteeringSFTTrainer
    from .spikes import LossSpikeError, LossSpikes
    from .together import share_weights, train_together
    from .trainer import SteeringTrainer
    from .views import View, ViewError, get_view

_HOME = {
    "Batch": "_batch",
    "Bias": "biases",
    "BiasError": "biases",
    "CheckpointError": "_resume",
    "DataError": "_data",
    "FrozenPrefix": "prefix",
    "LossSpikeError": "spikes",
    "LossSpikes": "spikes",
    "ModelAt": "_at",
    "NonFiniteError": "_guard",
    "SteeringDPOTrainer": "dpo",
    "SteeringSFTTrainer": "sft",
    "SteeringTrainer": "trainer",
    "View": "views",
    "ViewError": "views",
    "collator": "_data",
    "get_bias": "biases",
    "get_view": "views",
    "labelled_logits": "_at",
    "last_checkpoint": "_resume",
    "scalable": "_at",
    "scaled": "_at",
    "share_weights": "together",
    "tokenise": "_data",
    "train_together": "together",
}
__all__ = [
    "Batch",
    "Bias",
    "BiasError",
    "CheckpointError",
    "DataError",
    "FrozenPrefix",
    "LossSpikeError",
    "LossSpikes",
    "ModelAt",
    "NonFiniteError",
    "SteeringDPOTrainer",
    "SteeringSFTTrainer",
    "SteeringTrainer",
    "View",
    "ViewError",
    "collator",
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
