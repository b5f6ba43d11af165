"""Export a trained vector to the format of another tool, or into the weights of the model.

    export(model, "peft", "my-export", base="HuggingFaceTB/SmolLM2-135M-Instruct")

Each file of this folder is one target, named by the file; a new file is a new target. Every export comes with the
lines that load it without this package, and is kept only if a fresh process that runs them gets the same logits.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..description import FILE, write_json
from ..registry import choose, file_names
from ._base import Export, Exported, ExportError
from ._read import description_of
from ._vectors import ConstantVectors, adapter_of, constant_vectors
from ._verify import verify

__all__ = [
    "ConstantVectors",
    "Export",
    "ExportError",
    "Exported",
    "adapter_of",
    "constant_vectors",
    "description_of",
    "export",
    "get",
]


def names() -> list[str]:
    """The names of all targets: the files of this folder that do not start with an underscore."""
    return file_names(__path__[0])


def get(target: str) -> Export:
    """A target by name.

    Raises:
        ValueError: the name is unknown; the message suggests the nearest one.
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
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Exported:
    """Write the active steering vector of a model for another tool, and verify the export.

    Args:
        model: The base model with one active steering vector.
        target: One of `names()`.
        folder: A new or empty folder.
        base: The local folder or Hub name from which a fresh process loads the base model.
        inputs: Token ids of some prompts, on which logits are compared.
        strength: Multiplies the exported vector.
        called: The base model's name in the README, if `base` is a local copy.
        tokenizer: The model's tokenizer. It is saved with exports that are a whole model, so that they can be served.

    Raises:
        ExportError: the adapter is not a constant vector, the target cannot represent it on this model, or the export
            does not behave the same. No files are left behind.
    """
    writer, home = get(target), Path(folder)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ExportError(f"{home} is not empty, and an export never overwrites anything. Choose a new folder.")
    writer.check_packages()
    vectors = constant_vectors(model, strength)
    writer.check(vectors, model)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}.") as part:
        whole = Path(part) / "export"
        whole.mkdir()
        writer.write(vectors, model, whole)
        write_json(whole / FILE, vectors.description)
        if tokenizer is not None and writer.whole_model:
            tokenizer.save_pretrained(whole)
        error, effect = verify(writer, whole, model, base, inputs, strength)
        lines = writer.lines(called or base, home.name, model)
        readme = writer.readme(vectors, called or base, strength, lines, error, effect)
        (whole / "README.md").write_text(readme, encoding="utf-8")
        if home.exists():
            home.rmdir()
        whole.rename(home)
    return Exported(target, home, writer.lines(called or base, str(home), model), error, effect)
