"""Monitors as folders: `monitor.safetensors` with the direction, `monitor.json` with everything else.

The JSON holds a checksum of itself and of the weights. Loading compares the base model, the layer and the tokenizer
with those that the monitor was made for: with others, its scores would be silently meaningless.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save_file
from torch import nn

from ..blocks import find_blocks
from ..fingerprint import check_fingerprint_form, difference, fingerprint
from ..observing import base_model
from ..registry import choose
from ..saved import check_tensor, checksum_of, read_tensors
from ..types import Site
from . import fits, pooling
from .monitor import Calibration, Monitor, module_at, tokenizer_print
from .reading import Tokens
from .threshold import MonitorError, Threshold

CONFIG, WEIGHTS = "monitor.json", "monitor.safetensors"
_FORMAT = 1
_KEY = ".monitor.weight"
_LARGEST = 10**7  # bytes
_TEXTS = ("method", "site", "module", "tokens", "base_name", "checksum")


def save(monitor: Monitor, folder: str | Path) -> Path:
    """Save a monitor as a folder.

    Args:
        monitor: The monitor.
        folder: A new folder, or one that holds a monitor, which is replaced.

    Raises:
        MonitorError: the folder holds something else.
    """
    home = Path(folder)
    others = [file for file in home.iterdir() if file.name not in (CONFIG, WEIGHTS)] if home.is_dir() else []
    if others or (home.exists() and not home.is_dir()):
        raise MonitorError(f"{home} holds something other than a monitor. Choose another folder.")
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}.") as part:
        weights = Path(part) / WEIGHTS
        tensors = {f"{monitor.module}{_KEY}": monitor.weight.float().contiguous()}
        save_file(tensors, weights, metadata={"format": "pt"})
        config = _to_json(monitor)
        config["checksum"] = checksum_of(config, str(weights))
        (Path(part) / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        # The configuration comes last: new weights beside an old configuration fail its checksum.
        for name in (WEIGHTS, CONFIG):
            (Path(part) / name).replace(home / name)
    return home


def load(
    folder: str | Path, model: nn.Module, tokenizer: Any, layer: int | None = None, site: Site | None = None
) -> Monitor:
    """Load a monitor for a model, which may have any adapters.

    Args:
        folder: The folder of the monitor.
        model: The model that it will read.
        tokenizer: Its tokenizer.
        layer: The layer that the monitor must read; None for any.
        site: The site that the monitor must read; None for any.

    Raises:
        MonitorError: the folder holds no monitor, or a damaged one, or the monitor was made for another base model,
            layer, site or tokenizer; the message names both.
    """
    monitor = read(folder)
    base = base_model(model)
    if (what := difference(monitor.base, fingerprint(base))) is not None:
        raise MonitorError(
            f"{folder} is a monitor of another base model ({monitor.base_name}): "
            f"{what.replace('the adapter', 'the monitor')}. Load that model, or fit a monitor on this one."
        )
    depth = len(find_blocks(base))
    actual = module_at(model, monitor.layer, monitor.site) if 0 <= monitor.layer < depth else "no such layer"
    for name, expected, value in (("layer", layer, monitor.layer), ("site", site, monitor.site)):
        if expected is not None and expected != value:
            raise MonitorError(f"{folder} is a monitor of {name} {value}, not of {name} {expected}. Fit one there.")
    if actual != monitor.module:
        raise MonitorError(
            f"{folder} reads {monitor.module}, but layer {monitor.layer} ({monitor.site}) of this model is {actual}. "
            "Load the model that it was made for, or fit a monitor on this one."
        )
    _check_tokenizer(folder, monitor.tokenizer, tokenizer)
    return monitor


def read(folder: str | Path) -> Monitor:
    """Read a monitor without a model to compare it with.

    Raises:
        MonitorError: the folder holds no monitor, or a damaged one.
    """
    home = Path(folder)
    if not (home / CONFIG).is_file() or not (home / WEIGHTS).is_file():
        raise MonitorError(f"{folder} is not a monitor: it does not hold both {CONFIG} and {WEIGHTS}.")
    try:
        text = (home / CONFIG).read_bytes()
        if len(text) > _LARGEST:
            raise ValueError(f"{CONFIG} has more than {_LARGEST} bytes")
        config = json.loads(text.decode("utf-8"))
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            raise ValueError(f"{CONFIG} is not of format {_FORMAT}")
        if config.get("checksum") != checksum_of(config, str(home / WEIGHTS)):
            raise ValueError("it was changed after it was saved")
        return _from_json(config, read_tensors(home / WEIGHTS))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MonitorError(f"{folder} is damaged: {error}. Save or download it again.") from error


def _to_json(monitor: Monitor) -> dict[str, Any]:
    config = {one.name: getattr(monitor, one.name) for one in fields(monitor) if one.name != "weight"}
    config["pooling"] = {"name": monitor.pooling.name, **asdict(monitor.pooling)}
    for name in ("threshold", "calibration"):
        config[name] = None if config[name] is None else asdict(config[name])
    return {"format": _FORMAT, **config}


def _from_json(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Monitor:
    """Build a monitor from its JSON and its tensors; the errors say what is wrong."""
    for name in _TEXTS:
        if not isinstance(config[name], str):
            raise ValueError(f"{name}={config[name]!r:.80} must be a string")
    choose("method", config["method"], fits.names())
    choose("site", config["site"], get_args(Site))
    choose("tokens", config["tokens"], get_args(Tokens))
    check_fingerprint_form(config["base"])
    key = f"{config['module']}{_KEY}"
    if [*tensors] != [key]:
        raise ValueError(f"{WEIGHTS} holds {[*tensors]}, but {CONFIG} describes {key}")
    check_tensor(key, tensors[key])
    layer, bias = config["layer"], config["bias"]
    place: dict[str, Any] = {name: config[name] for name in ("method", "site", "module", "tokens", "base_name")}
    if not isinstance(layer, int) or isinstance(layer, bool) or not isinstance(bias, float):
        raise ValueError(f"layer={layer!r:.80} must be a whole number and bias={bias!r:.80} a number")
    return Monitor(
        **place,
        pooling=pooling.get(**config["pooling"]),
        layer=layer,
        weight=tensors[key].float(),
        bias=bias,
        base=config["base"],
        tokenizer={str(name): str(value) for name, value in config["tokenizer"].items()},
        threshold=None if config["threshold"] is None else Threshold(**config["threshold"]),
        calibration=None if config["calibration"] is None else Calibration(**config["calibration"]),
        fitted_on={str(name): int(value) for name, value in config["fitted_on"].items()},
    )


def _check_tokenizer(folder: str | Path, expected: Mapping[str, str], tokenizer: Any) -> None:
    actual = tokenizer_print(tokenizer)
    for part in ("vocabulary", "chat_template"):
        if expected.get(part) != actual[part]:
            raise MonitorError(
                f"{folder} is a monitor of text read by another tokenizer: the {part.replace('_', ' ')} of "
                f"{actual['name']!r} is not that of {expected.get('name')!r}. Load that tokenizer, or fit a monitor "
                "with this one."
            )
