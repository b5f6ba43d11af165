"""Read and check the files of a saved adapter, and reject bad ones with an error that says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .registration import PEFT_TYPE
from .types import Declared

_LARGEST_CONFIG = 10**7  # bytes
CHECKSUMS = "checksums.json"
_CHECKSUM = "sha256-"
# base_model.model.<module>.steer.steering_vector_<v|w|b>.weight
KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.steer\.steering_vector_(?P<name>[vwb])\.weight")


def read_config(path: str) -> dict[str, Any]:
    """Read the `adapter_config.json` of a steering vector.

    Raises:
        TypeError: the file does not name its method. PEFT's own configurations raise the same error.
        ValueError: it is not a JSON object, is too large, or is of another kind of adapter.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST_CONFIG + 1)
        if len(text) > _LARGEST_CONFIG:
            raise ValueError(f"more than {_LARGEST_CONFIG} bytes")
        values = json.loads(text.decode("utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the configuration of an adapter: {error}. Save or download it again."
        ) from error
    kind = values.get("peft_type")
    if kind is None:
        raise TypeError(
            f"{path} holds a None adapter. The SteeringVectorConfig config that is trying to be loaded is missing "
            "required keys: {'peft_type'}."
        )
    if kind != PEFT_TYPE:
        raise ValueError(f"{path} holds a {kind} adapter, not a steering vector. PeftModel.from_pretrained loads it.")
    if values.get("auto_mapping") is not None:
        raise ValueError(f"{path}: auto_mapping names code to import, which a steering vector never needs. Remove it.")
    return values


def check_adapter_folder(folder: str, config: Declared) -> None:
    """Check the weights of a local adapter folder before anything is built from it.

    A folder that is not on this machine is skipped; its tensors are checked when they are loaded.

    Raises:
        ValueError: no safetensors file is found (pickles are never read), the file is broken, keys are missing or
            unknown, a shape or dtype is wrong, a value is NaN or infinite, or the bytes differ from those saved.
    """
    if not os.path.isdir(folder):
        return
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.lexists(path):
        pickle = os.path.join(folder, WEIGHTS_NAME)
        if os.path.isfile(pickle):
            raise ValueError(
                f"{pickle} is a pickle, which can run code when read. Save it as {SAFETENSORS_WEIGHTS_NAME}."
            )
        return  # only a configuration: PEFT reports the missing weights
    tensors = read_tensors(path)
    vectors = {key: tensor for key, tensor in tensors.items() if "steering_vector_" in key}
    _check_keys(path, vectors, config)
    _check_others(path, tensors.keys() - vectors.keys(), config)
    for key, tensor in tensors.items():
        check_tensor(f"{path}: {key}", tensor)
    _check_checksum(folder, path)


def checksum_of(config: dict[str, Any], weights: str) -> str:
    """A checksum of an adapter's configuration together with its file of weights."""
    values = json.loads(json.dumps({key: value for key, value in config.items() if key != "checksum"}))
    text = json.dumps([values, sha256_of(weights)], sort_keys=True)
    return _CHECKSUM + hashlib.sha256(text.encode()).hexdigest()


def _check_checksum(folder: str, weights: str) -> None:
    config = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(config):
        return
    values = read_config(config)
    # A flipped bit in its key would hide the checksum, so it is searched for by its value too.
    keys = [key for key, value in values.items() if isinstance(value, str) and value.startswith(_CHECKSUM)]
    checksum = values.get("checksum")
    if (checksum is not None and checksum != checksum_of(values, weights)) or keys not in ([], ["checksum"]):
        raise ValueError(
            f"{folder} was damaged or changed after it was saved: its checksum differs. Save or download it again. "
            f"To use it as it is, set checksum to null in {CONFIG_NAME}."
        )


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        ValueError: the file is missing, incomplete or damaged.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("the file does not exist")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Write `checksums.json`: the digest of every file of weights or JSON in a folder and below.

    The file is never incomplete, even if the process is killed.
    """
    files = [file for file in sorted(Path(folder).rglob("*")) if file.suffix in (".safetensors", ".json", ".jsonl")]
    files = [file for file in files if file.is_file() and file.name != CHECKSUMS]
    digests = {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}
    part = Path(folder) / f"{CHECKSUMS}.part"
    part.write_text(json.dumps(digests, indent=1), encoding="utf-8")
    part.replace(Path(folder) / CHECKSUMS)


def check_checksums(folder: str | os.PathLike[str]) -> None:
    """Compare the files of a folder with its `checksums.json`, if it has one.

    Raises:
        ValueError: a file is missing or has changed; the message names it.
    """
    file = Path(folder) / CHECKSUMS
    if not file.exists():
        return
    try:
        digests = json.loads(file.read_text(encoding="utf-8"))
        damaged = [name for name, digest in digests.items() if sha256_of(Path(folder) / name) != digest]
    except (ValueError, AttributeError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{file} cannot be checked ({error})") from error
    if damaged:
        raise ValueError(f"{Path(folder) / damaged[0]} was changed after it was written")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError if a tensor is not floating point, or holds NaN or infinite values."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is of {tensor.dtype}: weights must be floating point. The file is not usable.")
    bad = int((~torch.isfinite(tensor.float())).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}. The file is not usable.")


def module_names(pattern: str) -> list[str]:
    """The modules that a saved `target_modules` names: escaped names with "|" between them.

    Other regular expressions are refused, because matching some of them takes practically forever.

    Raises:
        ValueError: it is another regular expression.
    """
    names = [re.sub(r"\\(.)", r"\1", part) for part in pattern.split("|")]
    if "|".join(map(re.escape, names)) != pattern or not all(re.fullmatch(r"[\w.]+", name) for name in names):
        raise ValueError(
            f"target_modules={pattern!r:.200} is a regular expression, but a saved adapter must name its modules. "
            "Create the adapter with the same target_modules on its model, and save it again."
        )
    return names


def _check_keys(path: str, tensors: dict[str, torch.Tensor], config: Declared) -> None:
    parameters: dict[str, set[str]] = {}  # module -> names of its parameters in the file
    modules = None if config.target_modules is None else module_names(config.target_modules)
    hidden_size = (config.base_fingerprint or {}).get("hidden_size")
    # Without a fingerprint (a model without a transformers configuration), modules may differ in width.
    widths: dict[str | None, int] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or (modules is not None and match["module"] not in modules):
            raise ValueError(f"{path}: key {key!r} does not belong to an adapter on {config.target_modules!r}.")
        parameters.setdefault(match["module"], set()).add(match["name"])
        shape = tuple(tensor.shape)
        group = None if modules is None else match["module"]
        if config.parameter_shape(match["name"], 0)[-1:] == (0,) and shape:  # as wide as the stream
            widths.setdefault(group, hidden_size or shape[-1])
        d = widths.get(group)
        expected = config.parameter_shape(match["name"], d or 0)
        if shape != expected:
            raise ValueError(f"{path}: {key} has shape {shape}, but the config asks for {expected}.")
    for module, names in parameters.items():
        if names != set(config.parameter_names):
            raise ValueError(
                f"{path}: {module} holds {sorted(names)}, but form={config.form!r} needs {config.parameter_names}."
            )
    layers = config.layers if isinstance(config.layers, list) else None
    expected_layers = None if layers is None else 1 if config.tied else len(layers)
    if expected_layers is not None and len(parameters) != expected_layers:
        raise ValueError(
            f"{path} holds vectors for {len(parameters)} layers, but the config names {expected_layers}: {layers}."
        )


def _check_others(path: str, keys: Iterable[str], config: Declared) -> None:
    """Refuse weights of the base model, which PEFT and transformers would load into it."""
    for key in undeclared(keys, config):
        raise ValueError(
            f"{path}: {key!r} is not a steering vector, and modules_to_save={config.modules_to_save} does not name "
            "it. It would overwrite the base model: remove it from the file."
        )


def undeclared(keys: Iterable[str], config: Declared) -> list[str]:
    """The keys that belong neither to a steering vector nor to a module in `modules_to_save`, sorted."""
    saved = config.modules_to_save or []
    return [
        key
        for key in sorted(keys)
        if "steering_vector_" not in key and not any(f".{name}." in f".{key}" for name in saved)
    ]


def drop_undeclared(path: str, config: Declared) -> None:
    """Remove weights that would make a saved adapter unloadable from its file, with a warning."""
    tensors = read_tensors(path)
    names = undeclared(tensors, config)
    if names:
        warnings.warn(
            f"{names} are weights of the base model (its vocabulary was resized, or save_embedding_layers=True was "
            "given) and are not saved with the adapter. Save the base model itself and load the adapter on it, or "
            "name the modules in modules_to_save.",
            stacklevel=4,
        )
        save_file(
            {key: tensor for key, tensor in tensors.items() if key not in names}, path, metadata={"format": "pt"}
        )


def local_folder(name: str, subfolder: str | None = None, **hub_options: Any) -> str:
    """The local folder of an adapter; for a Hub repository, that of its downloaded weights."""
    folder = os.path.join(name, subfolder or "")
    if os.path.isdir(name):
        return folder
    try:
        return os.path.dirname(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub_options))
    except (HfHubHTTPError, HFValidationError, OSError):
        return folder  # only a configuration: PEFT reports the missing weights
