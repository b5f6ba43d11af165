"""The vectors of a running service, which are added, replaced and removed by name while it answers.

Every version of a vector is a separate adapter in the model. An answer keeps the version that it began with; a
replaced version is deleted once the last answer that uses it is complete.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.description import read_description
from steertune.adapters.layer import check_adapter_name
from steertune.recipes.lab.data import adapter_config
from steertune.recipes.lab.files import ArmError, nearest, shown
from steertune.recipes.lab.generation import check_strength

_LONGEST_NAME = 64


@dataclass(eq=False)
class Vector:
    """One version of a vector.

    Attributes:
        name: Its name in requests.
        adapter: Its adapter name in the model.
        config: Its configuration.
        digest: Hash of its weights.
        strength: The strength entry of its description (see `adapters/description.py`), if there is one.
        uses: How many waiting or running answers use it.
        named: Whether its name still refers to this version.
    """

    name: str
    adapter: str
    config: SteeringVectorConfig
    digest: str
    strength: dict[str, Any] | None = None
    uses: int = field(default=0)
    named: bool = field(default=True)


class Vectors:
    """The vectors of one model.

    `add`, `remove` and `sweep` change the model, so only the thread that runs it can call them; the other methods can
    be called from any thread.

    Attributes:
        model: The model with its vectors; the plain base model until the first one is added.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._named: dict[str, Vector] = {}
        self._all: list[Vector] = []
        self._versions = 0
        self._lock = threading.RLock()

    @property
    def named(self) -> dict[str, Vector]:
        """The vectors that requests can name, sorted by name."""
        with self._lock:
            return dict(sorted(self._named.items()))

    def add(self, name: str, folder: Path) -> Vector:
        """Load a vector under a name. If the name is taken, later requests get the new vector.

        Raises:
            ArmError: the folder holds no usable vector of this model, or the name is not valid.
        """
        check_vector_name(name)
        config = adapter_config(folder)
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        if not weights.is_file():
            raise ArmError(f"{name}: the folder has no {SAFETENSORS_WEIGHTS_NAME}.")
        with self._lock:
            self._versions += 1
            taken = isinstance(self.model, PeftModel) and name in self.model.peft_config
            adapter = f"{name}~{self._versions}" if taken else name
            digest = hashlib.blake2b(weights.read_bytes(), digest_size=8).hexdigest()
            vector = Vector(name, adapter, config, digest, _strength(folder))
            self._load(vector, folder)
            if (old := self._named.get(name)) is not None:
                old.named = False
            self._named[name] = vector
            self._all.append(vector)
        self.sweep()
        return vector

    def _load(self, vector: Vector, folder: Path) -> None:
        try:
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(folder), adapter_name=vector.adapter)
            else:
                self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=vector.adapter)
        except Exception as error:
            if isinstance(self.model, PeftModel) and vector.adapter in self.model.peft_config:
                self.model.delete_adapter(vector.adapter)
            if not isinstance(error, ValueError | RuntimeError | OSError):
                raise
            raise ArmError(f"{vector.name}: {error}") from error
        self.model.eval()

    def remove(self, name: str) -> None:
        """Remove a name.

        Raises:
            ArmError: no vector has this name.
        """
        with self._lock:
            self.check(name)
            self._named.pop(name).named = False
        self.sweep()

    def sweep(self) -> None:
        """Delete the versions that no longer have a name and are not in use."""
        with self._lock:
            for vector in [vector for vector in self._all if not vector.named and not vector.uses]:
                if len(self._all) == 1:  # PEFT needs at least one adapter; without any, go back to the plain model
                    self.model = self.model.unload().eval()
                else:
                    self.model.delete_adapter(vector.adapter)
                self._all.remove(vector)

    def check(self, name: str, strength: float = 1.0) -> None:
        """Raise an ArmError unless a request can use this vector at this strength."""
        with self._lock:
            vector = self._named.get(name)
            if vector is None:
                names = sorted(self._named)
                raise ArmError(f"vector={shown(name)} is unknown. Choose from {names}.{nearest(name, names)}")
            check_strength(self.model, strength, vector.adapter)

    def hold(self, names: list[str]) -> list[Vector]:
        """The current versions of some vectors, which are kept until `release`.

        Raises:
            ArmError: a name is unknown.
        """
        with self._lock:
            for name in names:
                self.check(name)
            vectors = [self._named[name] for name in names]
            for vector in vectors:
                vector.uses += 1
            return vectors

    def release(self, vectors: list[Vector]) -> None:
        """Give up these versions, since the answer that used them is complete."""
        with self._lock:
            for vector in vectors:
                vector.uses -= 1

    @property
    def unused(self) -> bool:
        """Whether `sweep` would delete anything."""
        with self._lock:
            return any(not vector.named and not vector.uses for vector in self._all)


def _strength(folder: Path) -> dict[str, Any] | None:
    """The strength entry of a vector's description.

    Raises:
        ArmError: the file describes other weights.
    """
    try:
        values = read_description(folder)
    except ValueError as error:
        raise ArmError(str(error)) from error
    return None if values is None else values["strength"]


def check_vector_name(name: str) -> None:
    """Refuse a name that cannot be part of a model name such as `base+careful@1.5`.

    Raises:
        ArmError: it is empty or too long, or contains anything but letters, digits, "_" and "-".
    """
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII) or len(name) > _LONGEST_NAME:
        raise ArmError(
            f"{shown(name)} is not a valid vector name. Use letters (a-z), digits, '_' and '-', at most "
            f"{_LONGEST_NAME}, without '@', '+' and '.'."
        )
    try:
        check_adapter_name(name)
    except ValueError as error:
        raise ArmError(str(error)) from error
