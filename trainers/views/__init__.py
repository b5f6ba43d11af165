"""Views: the same example after another prompt, for losses that compare the model with itself. One file each.

A loss calls `at(strength, view="good")`, and the trainer has the view from `views={"good": get_view(...)}`.
"""

from __future__ import annotations

from ._base import View, ViewError, get_view, names
from ._table import Views

__all__ = ["View", "ViewError", "Views", "get_view", "names"]
