"""Logistic regression: the normal of the plane that separates bad from innocent rows, as in
`adapters/directions/probe.py`. All rows weigh the same.
"""

from torch import Tensor

from ...directions import probe


def fit(bad: Tensor, innocent: Tensor) -> Tensor:
    """`(bad rows, d)` and `(innocent rows, d)` -> `(d,)`."""
    return probe.fit({0: bad}, {0: innocent})[0]
