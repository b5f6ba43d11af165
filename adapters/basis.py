"""The fixed vectors of `form="span"`: existing steering vectors, whose sum is trained by its coefficients alone.

The span of k vectors has k dimensions and not d: with a few vectors that were trained on other behaviours, one to
eight examples can decide how much of each is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from .analysis.arithmetic import VectorError, Vectors, check_alike, read


def basis_of(basis: str | Sequence[str] | None) -> list[Vectors]:
    """Read the vectors of a basis, in the order of the list, or of the folders' names.

    Args:
        basis: Adapter folders, or one folder that holds them.

    Raises:
        ValueError: the folder holds none, or they are not added at the same places of the same base model.
    """
    if basis is None:
        raise ValueError(
            "form='span' needs a basis (got None): the adapter folders of existing vectors, or one folder that holds "
            "them."
        )
    folders = [Path(basis)] if isinstance(basis, str) else [*map(Path, basis)]
    if isinstance(basis, str) and not (folders[0] / CONFIG_NAME).is_file():
        folders = sorted(file.parent for file in folders[0].glob(f"*/{CONFIG_NAME}"))
    if not folders:
        raise ValueError(f"basis={basis!r} holds no adapter folder. Give folders of saved steering vectors.")
    vectors = [read(folder) for folder in folders]
    try:
        check_alike(vectors)
    except VectorError as error:
        raise ValueError(f"basis={basis!r}: {error}") from error
    return vectors


def rows_of(vectors: Sequence[Vectors], layer: int, width: int) -> Tensor:
    """The vectors of a basis at one layer, `(k, d)`.

    Raises:
        ValueError: they do not steer this layer, or have another width.
    """
    for one in vectors:
        if layer not in one.vectors:
            raise ValueError(
                f"{one.name} steers the layers {one.layers}, and the span is wanted at layer {layer}. Set layers= to "
                "those of the basis."
            )
    rows_KD = torch.stack([one.vectors[layer] for one in vectors])
    if rows_KD.shape[1] != width:
        raise ValueError(f"The basis has width {rows_KD.shape[1]}, the model's stream has {width}: another model.")
    return rows_KD
