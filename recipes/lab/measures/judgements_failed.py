"""How many generated answers could not be judged."""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("share of judgements that failed", better="lower", needs=["answers"], limits=(0, 1))
def judgements_failed(seen: Seen) -> Array:
    """1 for an answer without a score, `(answers,)`."""
    return np.isnan(seen["score"]).astype(float)
