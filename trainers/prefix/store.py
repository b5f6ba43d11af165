"""Store tensors by the content they were computed from: in RAM up to a budget, then in memory-mapped files.

A key is a digest of the weights, the settings and the row of inputs that a tensor was computed from. `TensorStore`
stores tensors that recomputation would reproduce bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor, nn

from ...adapters.blocks import text_config
from ..host_copies import both, on_host
from .exactness import Unknown

_VERSION = "v3"  # of the file format; files of other versions are not read
_GB = 10**9
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # numbers at a time
_NO_SETTINGS = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
_PER_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
logger = logging.getLogger(__name__)


# -- keys -----------------------------------------------------------------------------------------------------------


def weights_key(tensors: Iterable[tuple[str, Tensor]], *settings: Any) -> str:
    """A digest of weights: name, shape, dtype, and a digest of their bits.

    That is xxHash (XXH3, 128 bits) on a CPU, where it takes as long as reading them does. On a device it is the exact
    sum of the bits as integers, each times its position (modulo 2⁶⁴), which does not depend on the order of addition.

    Args:
        tensors: Names and tensors.
        settings: Whatever else a result depends on, compared as text; versions of torch and transformers are added.
    """
    settings = (*settings, torch.__version__, transformers.__version__)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for name, tensor in tensors:
        # integers of the same bits: NaNs and negative zeros count, too
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
    """The model's attention implementation, on which rounding depends."""
    return getattr(model.config, "_attn_implementation", None)  # transformers has no public name for it


def config_of(model: nn.Module) -> str:
    """The settings of a decoder that its outputs depend on, as text: epsilons and windows are not in the weights."""
    values = text_config(model).to_dict()
    return json.dumps({k: v for k, v in values.items() if k not in _NO_SETTINGS}, sort_keys=True, default=str)


def rows_of(inputs: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The rows of a batch of model inputs, each alone, `(1, tokens)`, without the padding on its right.

    Raises:
        Unknown: the call has no token ids, or a tensor that does not belong to one row (images, embeddings,
            lengths of packed sequences, a prepared mask).
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise Unknown("the call has no input_ids of shape (rows, tokens)")
    # only tensors with one value per token can be cut into rows
    shape, per_token = ids.shape, {}
    for name, value in inputs.items():
        if name in _PER_ROW and isinstance(value, Tensor) and value.shape in (shape, (1, shape[1])):
            per_token[name] = value if value.shape == shape else both(lambda v: v.expand(shape), value)
        elif not (value is None or isinstance(value, bool | int | float | str) or _is_number(value)):
            raise Unknown(f"the input {name!r} is not one value per token")
    # without a mask none is added, because a model may treat the two differently
    mask = per_token.get("attention_mask")
    # padding on the right does not belong to a row; on the left it does, because it moves positions
    real = torch.ones(shape, dtype=torch.bool) if mask is None else on_host(mask).bool()
    # several texts in one row
    positions = per_token.get("position_ids")
    if positions is not None and bool((on_host(positions).diff(dim=1) < 0)[real[:, 1:] & real[:, :-1]].any()):
        raise Unknown("position_ids that start again within a row pack several texts in one")
    lengths = (real * torch.arange(1, shape[1] + 1)).amax(dim=1).tolist()
    return [{name: _row(value, i, n) for name, value in per_token.items()} for i, n in enumerate(lengths)]


def _row(values: Tensor, i: int, length: int) -> Tensor:
    return both(lambda v: v[i : i + 1, : length or None], values)


def _is_number(value: Any) -> bool:
    """Whether it is a single number, such as a count over the batch, on which no row's state depends."""
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


# -- tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """The location of a tensor on disk, and the digest of its bytes and of its other entries in the index."""

    key: str
    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    digest: str = ""

    def digest_of(self, data: Any) -> str:
        """The digest of these bytes and of the other entries."""
        what = f"{self.key}{self.shape}{self.dtype}".encode()
        return hashlib.blake2b(what + hashlib.blake2b(data).digest(), digest_size=8).hexdigest()


class TensorStore:
    """A dictionary of tensors that recomputation would reproduce bit for bit.

    Each process appends to its own file and lists the complete tensors in an index next to it. So several processes
    can share a folder, and what a killed process left incomplete is not in any index. Digests are compared when a
    tensor is read from disk. A tensor that cannot be stored (a full disk) or is damaged is simply computed again.

    Args:
        ram_gb: RAM budget for tensors in GB (10⁹ bytes); never exceeded.
        folder: Store tensors here for later runs. None: what does not fit in RAM goes to a temporary folder, which
            is deleted with this object.
        disk_gb: Disk budget of the folder in GB, including files of other versions and processes.

    Raises:
        ValueError: a budget is negative or not finite, or the folder is a file.
    """

    def __init__(self, ram_gb: float, folder: str | Path | None = None, disk_gb: float = 20.0) -> None:
        for name, value, what in (("ram_gb", ram_gb, "RAM"), ("disk_gb", disk_gb, "disk")):
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} must be the {what} budget in GB, 0 or more.")
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"folder={str(folder)!r} is a file. The cache needs a folder.")
        self.limit, self.disk_limit = int(ram_gb * _GB), int(disk_gb * _GB)
        self.nbytes = 0
        self.disk_bytes = 0
        self.kept_for_later = folder is not None
        self._folder = None if folder is None else Path(folder)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._segment: Path | None = None
        self._ram: dict[str, Tensor] = {}
        self._places: defaultdict[str, list[_Place]] = defaultdict(list)  # several, if another process had it too
        self._read: dict[Path, int] = {}  # bytes of every index file that were read
        self._writable = True
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._ram or key in self._places

    def __len__(self) -> int:
        return len(self._ram.keys() | self._places.keys())

    def get(self, key: str) -> Tensor | None:
        """The tensor of `key`, on the CPU, which callers must not change; None if it is unknown or damaged."""
        # RAM first, then the newest copy on disk whose bytes are intact
        if key in self._ram:
            return self._ram[key]
        while places := self._places.get(key):
            value = _load(places[-1])
            if value is not None:
                if self.kept_for_later:
                    self._keep(key, value)
                return value
            logger.warning("A tensor in %s is damaged or missing; it is computed again.", places.pop().file)
        self._places.pop(key, None)
        return None

    def put(self, key: str, value: Tensor) -> None:
        """Store a tensor; warn once if there is no room left."""
        # RAM first; a folder for later runs gets everything, temporary files only what does not fit in RAM
        value = value.detach().to("cpu").contiguous()
        in_ram = self._keep(key, value)
        if self._writable and key not in self._places and (self.kept_for_later or not in_ram):
            try:
                if self._on_disk() + value.nbytes > self.disk_limit:
                    where = f"{self._folder} holds {self._on_disk() / _GB:.2g} GB" if self.kept_for_later else "full"
                    raise OSError(f"of disk_gb={self.disk_limit / _GB:.2g}, {where}")
                self._append(key, value)
            except OSError as error:
                self._writable = False
                logger.warning(
                    "The frozen-prefix cache cannot write (%s). What exceeds %.2g GB of RAM is computed again.",
                    error,
                    self.limit / _GB,
                )

    def refresh(self) -> None:
        """Read what other processes have added to the folder."""
        if self._folder is None:
            return
        try:
            indices = sorted(self._folder.glob(f"{_VERSION}-*.index")) if self._folder.is_dir() else []
        except OSError as error:
            logger.warning("The frozen-prefix cache cannot read %s (%s).", self._folder, error)
            return
        # an index of another process may have grown since it was read
        for index in indices:
            if self._segment is None or index != self._segment.with_suffix(".index"):
                try:
                    if not index.is_file():  # reading a pipe would wait for ever
                        raise OSError("not a regular file")
                    self._read_index(index)
                except OSError as error:  # deleted in the meantime, or not readable
                    logger.warning("The frozen-prefix cache cannot read %s (%s).", index, error)

    def belongs_to(self, namespace: str, what: str) -> None:
        """Record in a folder for later runs which models it holds states of; warn if it has none of this model.

        Args:
            namespace: The namespace of the keys.
            what: A description of the model.
        """
        if not self.kept_for_later or self._folder is None:
            return
        note = self._folder / f"{_VERSION}-{namespace}.model"
        try:
            if note.exists():
                return
            others = [file.read_text(encoding="utf-8", errors="replace") for file in self._folder.glob("*.model")]
            old = {file.name.split("-")[0] for file in self._folder.glob("*.rows")} - {_VERSION}
            if others or old:
                held = "; ".join([*sorted(others), *(f"files of version {version}" for version in sorted(old))])
                logger.warning(
                    "The cache in %s holds %s. This run uses %s, which is computed anew.", self._folder, held, what
                )
            self._folder.mkdir(parents=True, exist_ok=True)
            note.write_text(what, encoding="utf-8")
        except OSError as error:
            logger.warning("The frozen-prefix cache cannot use %s (%s).", self._folder, error)

    # -- RAM ----------------------------------------------------------------------------------------------------

    def _keep(self, key: str, value: Tensor) -> bool:
        if key in self._ram:
            return True
        if self.nbytes + value.nbytes > self.limit:
            return False
        # pinned, so that copies to a device need not be waited for
        copy = value.clone()  # a view would keep the whole tensor in memory
        self._ram[key] = copy.pin_memory() if torch.cuda.is_available() else copy
        self.nbytes += value.nbytes
        return True

    # -- disk ---------------------------------------------------------------------------------------------------

    def _append(self, key: str, value: Tensor) -> None:
        # the data first, then the line of the index that says where they are
        segment = self._own_segment()
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        with segment.open("ab") as file:
            start = file.tell()
            file.write(data)
            file.flush()
            if self.kept_for_later:
                os.fsync(file.fileno())  # the data before the index line that points to them
        place = _Place(key, segment, start, tuple(value.shape), value.dtype)
        place = replace(place, digest=place.digest_of(data))
        line = [key, place.start, list(place.shape), str(place.dtype).removeprefix("torch."), place.digest]
        with segment.with_suffix(".index").open("a", encoding="utf-8") as index:
            index.write(json.dumps(line) + "\n")
        self._places[key].append(place)
        self.disk_bytes += len(data)

    def _on_disk(self) -> int:
        """Bytes of tensors in the folder, from all processes. Two that write at once can both find room for theirs."""
        if not self.kept_for_later or self._folder is None:
            return self.disk_bytes
        return sum(file.stat().st_size for file in self._folder.glob("*.rows"))

    def _own_segment(self) -> Path:
        if self._segment is None:
            if self._folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="steertune-prefix-")
                self._folder = Path(self._temporary.name)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._segment = self._folder / f"{_VERSION}-{uuid.uuid4().hex}.rows"
        return self._segment

    def _read_index(self, index: Path) -> None:
        # only complete lines that were not read before
        with index.open("rb") as file:
            file.seek(self._read.get(index, 0))
            for line in file:
                if not line.endswith(b"\n"):  # being written, or cut off
                    break
                self._read[index] = self._read.get(index, 0) + len(line)
                entry = _entry(line, index.with_suffix(".rows"))
                if entry is not None:
                    self._places[entry[0]].append(entry[1])


def _entry(line: bytes, segment: Path) -> tuple[str, _Place] | None:
    try:
        key, start, shape, dtype, digest = json.loads(line)
        sizes = [start, *shape]
        if not isinstance(key, str) or not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
            return None
        return key, _Place(key, segment, start, tuple(shape), _DTYPES[dtype], digest)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # ignore broken lines


def _load(place: _Place) -> Tensor | None:
    # mapped, not read: untouched pages take no memory
    count = math.prod(place.shape) * place.dtype.itemsize
    try:
        data: Any = np.memmap(place.file, np.uint8, "c", place.start, (count,))
    except (OSError, ValueError, OverflowError):  # missing, or shorter than the index says
        return None
    if place.digest_of(data) != place.digest:
        return None
    return torch.from_numpy(data).view(place.dtype).reshape(place.shape)
