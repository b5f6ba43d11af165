"""Moved to `steertune.adapters.analysis.erasure`. This name works for one more release."""

import sys
import warnings

from .analysis import erasure

warnings.warn(f"Import {erasure.__name__} instead of {__name__}, which has moved.", FutureWarning, stacklevel=2)
sys.modules[__name__] = erasure
