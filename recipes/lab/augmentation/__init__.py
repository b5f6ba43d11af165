"""Data augmentation: more training examples, made of the few there are. Each file is one way, named by the file.

    [augmentation]
    name = "rewrites"       # a file of this folder; its options follow
    times = 4               # so many times as many examples, the own ones among them

The claim to test is that plain finetuning on enough versions of few examples learns what a steering vector learns. So
the optimiser's budget stays what it was: with more examples each is read less often. Copies are left out, and so is
whatever comes near a row that is measured on.
"""

from __future__ import annotations

from ._base import AugmentationError, Augmenter, get_augmenter, names
from ._grown import Grown, grown, read

__all__ = ["AugmentationError", "Augmenter", "Grown", "get_augmenter", "grown", "names", "read"]
