"""The fixed vectors of `form="span"`: existing steering vectors, whose coefficients in a sum are trained.

The span of k vectors has k dimensions instead of d. With a few vectors that were trained on other behaviours, one to
eight examples can be enough to fit the coefficients.
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
        basis: Adapter folders, or one folder that contains them.

    Raises:
        ValueError: the folder contains no adapter, or they do not steer the same places of the same base model.
    """
    if basis is None:
        raise ValueError(
            "form='span' needs a basis (got None): the adapter folders of existing vectors, or one folder that "
            "contains them."
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
        ValueError: one of them does not steer this layer, or their width is not `width`.
    """
    for one in vectors:
        if layer not in one.vectors:
            raise ValueError(
                f"{one.name} steers layers {one.layers}, but layer {layer} was requested. Set layers= to the layers "
                "of the basis."
            )
    rows_KD = torch.stack([one.vectors[layer] for one in vectors])
    if rows_KD.shape[1] != width:
        raise ValueError(
            f"The basis has width {rows_KD.shape[1]}, but the model's residual stream has width {width}. Use vectors "
            "that were made for this model."
        )
    return rows_KD
