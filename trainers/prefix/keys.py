"""What a memoised tensor was computed from, as a short text: the weights, and one row of the inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from ...adapters.blocks import text_config
from ..host_copies import both, on_host

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # numbers at a time
_NO_SETTINGS = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
_PER_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class Unknown(ValueError):
    """A model was given an input that a row's key would not see; the message names it."""


def weights_key(tensors: Iterable[tuple[str, Tensor]], *settings: Any) -> str:
    """A digest of weights: name, shape, dtype, and a digest of their bits.

    That is xxHash (XXH3, 128 bits) on a CPU, where it takes as long as reading them does. On a device it is the exact
    sum of the bits as integers, each times its place (modulo 2⁶⁴), which does not depend on the order of addition.

    Args:
        tensors: Names and tensors.
        settings: Whatever else a result depends on, compared as text; versions of torch and transformers are added.
    """
    settings = (*settings, torch.__version__, transformers.__version__)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for name, tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
        content = xxhash.xxh3_128_hexdigest(bits.numpy().data) if bits.device.type == "cpu" else _placed_sum(bits)
        # PEFT puts a layer with an adapter one name deeper
        what = (name.replace(".base_layer.", "."), tuple(tensor.shape), str(tensor.dtype), content)
        digest.update(repr(what).encode())
    return digest.hexdigest()


def _placed_sum(bits: Tensor) -> int:
    """`Σ bits[i] (2i + 1)`, chunk by chunk: odd factors lose nothing modulo 2⁶⁴."""
    places = torch.arange(1, 2 * min(len(bits), _CHUNK), 2, device=bits.device)
    total = 0
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        total += int((chunk * places[: len(chunk)]).sum()) + 2 * start * int(chunk.sum())
    return total % (1 << 64)


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
            kept[name] = value if value.shape == shape else both(lambda v: v.expand(shape), value)
        elif not (value is None or isinstance(value, bool | int | float | str) or _is_number(value)):
            raise Unknown(f"the input {name!r} says more than the tokens of a row do")
    mask = kept.get("attention_mask")  # none: a model that is given one where there was none may do something else
    real = torch.ones(shape, dtype=torch.bool) if mask is None else on_host(mask).bool()
    positions = kept.get("position_ids")
    if positions is not None and bool((on_host(positions).diff(dim=1) < 0)[real[:, 1:] & real[:, :-1]].any()):
        raise Unknown("position_ids that start again within a row pack several texts in one")
    lengths = (real * torch.arange(1, shape[1] + 1)).amax(dim=1).tolist()
    return [{name: _row(value, i, n) for name, value in kept.items()} for i, n in enumerate(lengths)]


def _row(values: Tensor, i: int, length: int) -> Tensor:
    return both(lambda v: v[i : i + 1, : length or None], values)


def _is_number(value: Any) -> bool:
    """A count over the whole batch, say, which no row's state depends on."""
    return isinstance(value, Tensor) and value.ndim == 0


def row_key(namespace: str, row: Mapping[str, Tensor]) -> str:
    """A digest of one row of inputs, and of the precision it is computed in."""
    device = row["input_ids"].device.type
    precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
    digest = hashlib.blake2b(f"{namespace}/{device}/{precision}".encode(), digest_size=16)
    for name in sorted(row):
        value = on_host(row[name]).detach().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
