"""The base class of export targets."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peft import PeftModel
from torch import Tensor, nn

from ..blocks import find_blocks
from ._vectors import ConstantVectors, ExportError

__all__ = ["ADD", "LOAD", "Export", "ExportError", "Exported"]

LOAD = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r}).eval()
"""
"""Python lines that load the base model."""

ADD = """
def adding(vector):
    def hook(module, args, output):
        if isinstance(output, tuple):
            return (output[0] + vector).to(output[0].dtype), *output[1:]
        return (output + vector).to(output.dtype)
    return hook
"""
"""Python lines of a hook that adds a vector to the output of a module."""


@dataclass(frozen=True)
class Exported:
    """An export that was verified.

    Attributes:
        target: The target's name.
        folder: The folder of the export.
        lines: Python lines that load the steered model without this package.
        error: The largest difference between a logit in the fresh process and in the steered model.
        effect: The largest change of a logit caused by the vector, to compare `error` with.
    """

    target: str
    folder: Path
    lines: str
    error: float
    effect: float


class Export(ABC):
    """Base class of the targets. The file of a target defines one instance, `TARGET`.

    Attributes:
        packages: Packages that must be installed to write or verify an export.
        python: Python lines that load the export as `model`, with `{folder!r}`, `{base!r}` and `{dtype!r}` to fill in.
        note: What else a reader of the README should know.
        whole_model: Whether the folder is a complete model, so that the tokenizer is written too.
        verified_in: The tool that the files are meant for, if the lines do not run it.
        not_read: Why the format cannot be read back, and what to do instead.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    python: ClassVar[str]
    note: ClassVar[str] = ""
    whole_model: ClassVar[bool] = False
    verified_in: ClassVar[str] = ""
    not_read: ClassVar[str] = ""

    @property
    def can_read(self) -> bool:
        """Whether there is a file format to read back."""
        return not self.not_read

    @staticmethod
    def check_blocks_only(vectors: ConstantVectors, tool: str) -> None:
        """Raise an ExportError unless the vectors are added to block outputs."""
        if vectors.site != "block":
            raise ExportError(f"site={vectors.site!r}: {tool} adds to block outputs only. What works: safetensors.")

    def check_packages(self) -> None:
        """Raise an ExportError when a package is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ExportError(f"This target needs {missing}: pip install {' '.join(missing).replace('_', '-')}")

    @abstractmethod
    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Raise an ExportError if the target cannot represent the vectors; the message says what works instead."""

    @abstractmethod
    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write the files into an empty folder."""

    def read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read the vectors in a file or folder of the tool, by block; `adapter_of` turns them into an adapter.

        Args:
            source: A file or a folder, as written by `write` or by the tool itself.
            model: The base model that they are for, without adapters; it is not changed.

        Raises:
            ExportError: the source has another format, or cannot be expressed as vectors added to block outputs.
        """
        if self.not_read:
            raise ExportError(self.not_read)
        return self._read(source, model)

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """What `read` returns, for tools whose files can be read."""
        raise NotImplementedError

    def lines(self, base: str, folder: str, model: PeftModel) -> str:
        """The Python lines that load the export."""
        return self.filled(self.python, base, folder, model)

    @staticmethod
    def filled(python: str, base: str, folder: str, model: PeftModel) -> str:
        """Fill in the placeholders: BLOCKS with the name of the list of blocks, the others with Python literals."""
        blocks = find_blocks(model.get_base_model())[0][0].rpartition(".")[0]
        return python.replace("BLOCKS", blocks).format(
            base=base, folder=folder, dtype=str(model.dtype).removeprefix("torch.")
        )

    def readme(
        self, vectors: ConstantVectors, base: str, strength: float, lines: str, error: float, effect: float
    ) -> str:
        """The export's README."""
        return "\n".join([
            "# Exported steering vector",
            "",
            f"For `{base}`; added to the output of {', '.join(f'`{name}`' for name in vectors.vectors)}, at strength "
            f"{strength:g} of the adapter it was made from (baked in).",
            "",
            *([self.note, ""] if self.note else []),
            "```python",
            lines.strip(),
            "```",
            "",
            f"Verified by these lines in a fresh process: logits differ by at most {error:.2g} from the steered "
            f"model's, and the vector moves them by up to {effect:.2g}.",
            *([f"Unverified in {self.verified_in} itself, whose documented format the files follow."]
              if self.verified_in else []),
            "",
        ])  # fmt: skip
