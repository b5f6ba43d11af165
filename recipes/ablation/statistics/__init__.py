"""Statistics of a grid. One idea a file; all of it works on arrays and frames, not on runs."""

from typing import Any

Frame = Any
"""A pandas frame or series. Not annotated as one: type checkers cannot follow pandas' indexing."""
