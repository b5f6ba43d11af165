"""Inductive biases for ordinary training: activation addition's ingredients without its vector. One file each.

They change how any PEFT adapter, or the whole model, is trained:
`SteeringDPOTrainer(..., inductive_biases={"one_write": {}})`. A cap on the change is a term of the loss,
`get_loss("dpo", change_cap=...)`.
"""

from __future__ import annotations

from ._base import Bias, BiasError, get_bias, names

__all__ = ["Bias", "BiasError", "get_bias", "names"]
