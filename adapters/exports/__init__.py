"""The result somewhere else: a trained vector in the format of another tool, or in the weights.

    export(model, "peft", "my-export", base="HuggingFaceTB/SmolLM2-135M-Instruct")

Each file of this folder is one target, named by the file; a new file is a new target. Every export says how it is
loaded without this package, and is believed only after a fresh process has loaded it so and found the same logits.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from ..registry import choose, file_names
from ._base import Export, Exported, ExportError
from ._vectors import ConstantVectors, adapter_of, constant_vectors
from ._verify import verify

__all__ = ["ConstantVectors", "Export", "ExportError", "Exported", "adapter_of", "constant_vectors", "export", "get"]


def names() -> list[str]:
    """The targets: the files of this folder."""
    return file_names(__path__[0])


def get(target: str) -> Export:
    """A target by name.

    Raises:
        ValueError: an unknown name; the message names the nearest.
    """
    choose("target", target, names())
    return importlib.import_module(f"{__name__}.{target}").TARGET


def export(
    model: PeftModel,
    target: str,
    folder: str | Path,
    base: str,
    inputs: Sequence[Sequence[int]],
    strength: float = 1.0,
    called: str | None = None,
) -> Exported:
    """Write the active steering vector of a model for another tool, and verify what was written.

    Args:
        model: The base model with one active steering vector.
        target: One of `names()`.
        folder: A new or empty folder.
        base: What a fresh process loads the base model from: a local folder or a Hub name.
        inputs: Token ids of some prompts, at which logits are compared.
        strength: It is baked in.
        called: The base model's name for readers, where `base` is a copy of it on this machine.

    Raises:
        ExportError: the adapter is no constant vector, the target cannot carry it on this model, or what was written
            does not do the same. Nothing is left behind.
    """
    writer, home = get(target), Path(folder)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ExportError(f"{home} is not empty: an export never writes over anything. Choose a new folder.")
    writer.check_packages()
    vectors = constant_vectors(model, strength)
    writer.check(vectors, model)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}.") as part:
        whole = Path(part) / "export"
        whole.mkdir()
        writer.write(vectors, model, whole)
        error, effect = verify(writer, whole, model, base, inputs, strength)
        lines = writer.lines(called or base, home.name, model)
        readme = writer.readme(vectors, called or base, strength, lines, error, effect)
        (whole / "README.md").write_text(readme, encoding="utf-8")
        if home.exists():
            home.rmdir()
        whole.rename(home)
    return Exported(target, home, writer.lines(called or base, str(home), model), error, effect)
