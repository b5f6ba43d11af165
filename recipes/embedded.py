"""The former name of `steertune.recipes.lab.embedded`, kept for one release."""

import warnings

from steertune.recipes.lab.embedded import *  # noqa: F403
from steertune.recipes.lab.embedded import MODEL_NAME, load_model, load_tokenizer  # noqa: F401

warnings.warn("steertune.recipes.embedded is now steertune.recipes.lab.embedded.", FutureWarning, stacklevel=2)
