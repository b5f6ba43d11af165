"""Refuse bad values and bad files with an error that says what to do."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from .config import SteeringVectorConfig

# base_model.model.<module>.steer.steering_vector_<v|w|b>.weight
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.steer\.steering_vector_(?P<name>[vwb])\.weight")


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` when one of the allowed values is near, else nothing."""
    near = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def choose(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {list(allowed)}.{did_you_mean(value, allowed)}")


def check_adapter_folder(folder: str, config: SteeringVectorConfig) -> None:
    """Check the weights of a local adapter folder before anything is built from it.

    A folder that is not on this machine (a Hub repository) is left to PEFT; its tensors are checked when they are
    loaded and at the first forward.

    Raises:
        ValueError: no safetensors file (a pickle is never read), a broken file, missing or unknown keys, a wrong
            shape, NaN or infinite values.
    """
    if not os.path.isdir(folder):
        return
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        pickle = os.path.join(folder, WEIGHTS_NAME)
        if os.path.isfile(pickle):
            raise ValueError(
                f"{pickle} is a pickle, which can run code when read. Save it as {SAFETENSORS_WEIGHTS_NAME}."
            )
        return  # a bare config: PEFT reports the missing weights itself
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if "steering_vector_" in key}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    _check_keys(path, tensors, config)
    for key, tensor in tensors.items():
        check_tensor(f"{path}: {key}", tensor)


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError if a tensor holds NaN or infinite values."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}. The file is not usable.")


def _check_keys(path: str, tensors: dict[str, torch.Tensor], config: SteeringVectorConfig) -> None:
    found: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or not re.fullmatch(config.target_modules or ".+", match["module"]):
            raise ValueError(f"{path}: key {key!r} does not belong to an adapter on {config.target_modules!r}.")
        found.setdefault(match["module"], set()).add(match["name"])
        d = (config.base_fingerprint or {}).get("hidden_size")
        expected = parameter_shape(config, match["name"], d) if d else None
        if expected and tuple(tensor.shape) != expected:
            raise ValueError(f"{path}: {key} has shape {tuple(tensor.shape)}, the config asks for {expected}.")
    for module, names in found.items():
        if names != set(config.parameter_names):
            raise ValueError(
                f"{path}: {module} holds {sorted(names)}, form={config.form!r} needs {config.parameter_names}."
            )
    layers = config.layers if isinstance(config.layers, list) else None
    expected_layers = None if layers is None else 1 if config.tied else len(layers)
    if expected_layers is not None and len(found) != expected_layers:
        raise ValueError(
            f"{path} holds vectors for {len(found)} layers, the config names {expected_layers}: {layers}."
        )


def parameter_shape(config: SteeringVectorConfig, name: str, d: int) -> tuple[int, ...]:
    """Shape of parameter `v`, `w` or `b` for hidden size `d`."""
    if name == "b":
        return (config.rank,)
    return (config.rank, d) if config.form == "low_rank" else (d,)
