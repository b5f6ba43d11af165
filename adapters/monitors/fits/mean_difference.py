"""Mean difference: `mean(bad) - mean(innocent)`, the direction of `adapters/directions/mean_difference.py`."""

from torch import Tensor

from ...directions import mean_difference


def fit(bad: Tensor, innocent: Tensor) -> Tensor:
    """`(bad rows, d)` and `(innocent rows, d)` -> `(d,)`."""
    return mean_difference.fit({0: bad}, {0: innocent})[0]
