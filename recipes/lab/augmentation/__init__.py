"""Data augmentation: more training examples, made from few. Each file is one method, named by the file.

    [augmentation]
    name = "rewrites"       # a file of this folder; its options follow
    times = 4               # how many times as many examples, the originals included

The claim to test is that plain finetuning on enough versions of few examples learns what a steering vector learns. So
the number of steps does not change: with more examples, each is used less often. Copies are left out, and so are
versions that are close to a row of the evaluation.
"""

from __future__ import annotations

from ._base import AugmentationError, Augmenter, get_augmenter, names
from ._grown import Grown, grown, read

__all__ = ["AugmentationError", "Augmenter", "Grown", "get_augmenter", "grown", "names", "read"]
