"""The former name of `steertune.trainers.inductive_biases`; it works for one release."""

import warnings

from .inductive_biases import Bias, BiasError, get_bias, names

__all__ = ["Bias", "BiasError", "get_bias", "names"]

warnings.warn(
    "steertune.trainers.biases is now steertune.trainers.inductive_biases; the former name works for one release.",
    FutureWarning,
    stacklevel=2,
)
