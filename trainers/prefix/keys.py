"""What a memoised tensor was computed from, as a short text: the weights, and one row of the inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ...adapters.blocks import text_config

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 64
_NO_SETTINGS = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
_PER_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class Unknown(ValueError):
    """A model was given an input that a row's key would not see; the message names it."""


def weights_key(tensors: Iterable[tuple[str, Tensor]], *settings: Any) -> str:
    """A digest of weights: name, shape, dtype, the exact sum of their bits as integers, and 64 entries of each.

    The sum does not depend on the order of addition, so it is the same on every machine.

    Args:
        tensors: Names and tensors.
        settings: Whatever else a result depends on, compared as text; versions of torch and transformers are added.
    """
    settings = (*settings, torch.__version__, transformers.__version__)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for name, tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
        some = bits[:: max(1, bits.numel() // _SAMPLES)][:_SAMPLES].tolist()
        # PEFT puts a layer with an adapter one name deeper
        what = (name.replace(".base_layer.", "."), tuple(tensor.shape), str(tensor.dtype), int(bits.sum()), some)
        digest.update(repr(what).encode())
    return digest.hexdigest()


def attention_of(model: nn.Module) -> str | None:
    """The model's attention implementation, which rounds in its own way."""
    return getattr(model.config, "_attn_implementation", None)  # transformers has no public name for it


def config_of(model: nn.Module) -> str:
    """The settings of a decoder that its outputs depend on, as text: no weight says an epsilon or a window."""
    values = text_config(model).to_dict()
    return json.dumps({k: v for k, v in values.items() if k not in _NO_SETTINGS}, sort_keys=True, default=str)


def rows_of(inputs: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The rows of a batch of model inputs, each alone, `(1, tokens)`, without the padding on its right.

    Raises:
        Unknown: there are no token ids, or there is a tensor that does not belong to one row (images, embeddings,
            lengths of packed sequences, a prepared mask).
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise Unknown("there are no input_ids of shape (rows, tokens)")
    shape, kept = ids.shape, {}
    for name, value in inputs.items():
        if name in _PER_ROW and isinstance(value, Tensor) and value.shape in (shape, (1, shape[1])):
            kept[name] = value.expand(shape)
        elif not (value is None or isinstance(value, bool | int | float | str) or _is_number(value)):
            raise Unknown(f"the input {name!r} says more than the tokens of a row do")
    if "attention_mask" not in kept:
        kept["attention_mask"] = torch.ones_like(ids)
    columns = torch.arange(1, shape[1] + 1, device=ids.device)
    lengths = (kept["attention_mask"].bool() * columns).amax(dim=1).tolist()
    return [{name: value[i : i + 1, : n or None] for name, value in kept.items()} for i, n in enumerate(lengths)]


def _is_number(value: Any) -> bool:
    """A count over the whole batch, say, which no row's state depends on."""
    return isinstance(value, Tensor) and value.ndim == 0


def row_key(namespace: str, row: Mapping[str, Tensor]) -> str:
    """A digest of one row of inputs, and of the precision it is computed in."""
    device = row["input_ids"].device.type
    precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
    digest = hashlib.blake2b(f"{namespace}/{device}/{precision}".encode(), digest_size=16)
    for name in sorted(row):
        value = row[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
