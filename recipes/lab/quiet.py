"""Silence what libraries print that does not help the user of a command: progress bars, and warnings without a fix."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

# message, category, module: as narrow as possible, so that nothing else is hidden
_WARNINGS = (
    # TRL and this package use the name that works with every supported version of transformers
    (r"`gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.training_args"),
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.modeling_utils"),
    # PEFT looks for the base on the Hub to see whether its vocabulary has changed; an embedded model is not there
    (
        r"Could not find a config file in .* - will assume that the vocabulary",
        UserWarning,
        r"peft\.utils\.save_and_load",
    ),
)
_LOGS = {
    # a missing GPU needs no warning, and DeepSpeed writes this to standard output
    "DeepSpeed": "Setting accelerator to CPU",
    # the error that follows says it again, with the fix
    "datasets.packaged_modules.json.json": "Failed to load JSON from file",
    "datasets.packaged_modules.csv.csv": "Failed to read file",
    "datasets.packaged_modules.parquet.parquet": "Failed to read",
    # PEFT imports bitsandbytes, which looks for a faster kernel on CPUs, also where nothing is quantised
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def quiet_imports() -> None:
    """Silence what libraries log while they are imported; call this before importing them."""
    for name, start in _LOGS.items():
        logging.getLogger(name).addFilter(_Without(start))


def quiet() -> None:
    """Silence libraries, so that only the command's own progress bar is on the screen."""
    import datasets
    import transformers.utils.logging

    quiet_imports()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for message, category, module in _WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)


@dataclass(frozen=True)
class _Without(logging.Filter):
    """Leaves out records whose message starts with a text. A logger keeps equal filters once."""

    start: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)
