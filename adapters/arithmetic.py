"""Moved to `steertune.adapters.analysis.arithmetic`. This name works for one more release."""

import sys
import warnings

from .analysis import arithmetic

warnings.warn(f"Import {arithmetic.__name__} instead of {__name__}, which has moved.", FutureWarning, stacklevel=2)
sys.modules[__name__] = arithmetic
