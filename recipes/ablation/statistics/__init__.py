"""Statistics of a grid, one idea per file. All of them work on arrays and frames, not on runs."""

from typing import Any

Frame = Any
"""A pandas frame or series. Not annotated as one: type checkers cannot follow pandas' indexing."""
