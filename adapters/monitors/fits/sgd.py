"""A linear probe trained by stochastic gradient descent, as in `adapters/directions/sgd_probe.py`."""

from torch import Tensor

from ...directions import sgd_probe


def fit(bad: Tensor, innocent: Tensor) -> Tensor:
    """`(bad rows, d)` and `(innocent rows, d)` -> `(d,)`."""
    return sgd_probe.fit({0: bad}, {0: innocent})[0]
