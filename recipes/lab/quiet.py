"""What libraries say that is not for the person who runs a command: bars, and warnings that nobody can act on."""

from __future__ import annotations

import datasets
import transformers.utils.logging


def quiet() -> None:
    """Leave the one progress bar of a command alone on the screen."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
