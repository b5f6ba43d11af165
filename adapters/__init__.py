"""Steering vectors: trainable vectors in the residual stream, as a PEFT method.

Importing this package registers the method with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
`model.load_adapter` support it.
"""

from . import directions
from .config import SteeringVectorConfig
from .layer import SteeringVectorLayer, steering_layers
from .model import SteeringVectorModel
from .prompts import prompt_length
from .strength import set_strength

__all__ = [
    "SteeringVectorConfig",
    "SteeringVectorLayer",
    "SteeringVectorModel",
    "directions",
    "prompt_length",
    "set_strength",
    "steering_layers",
]
