"""The frozen prefix: pay once for the layers below what is trained."""

from .frozen import FrozenPrefix

__all__ = ["FrozenPrefix"]
