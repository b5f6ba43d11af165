"""The vectors of a running service: added, replaced and removed under names, while answers are under way.

Every version of a vector is an adapter of its own in the model. An answer keeps the version that it began with; a
version that is no longer named goes when the last answer that uses it is complete.
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
        name: What requests call it.
        adapter: What the model calls it.
        config: Its configuration.
        digest: Of its weights.
        strength: What its file says about strength (see `adapters/description.py`); None: nothing.
        uses: Answers that are waiting or under way.
        named: Whether its name still means it.
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

    `add`, `remove` and `sweep` change the model, so they belong to the thread that runs it; the others may be called
    from any thread.

    Attributes:
        model: The model with its vectors; a plain one before the first.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._named: dict[str, Vector] = {}
        self._all: list[Vector] = []
        self._versions = 0
        self._lock = threading.RLock()

    @property
    def named(self) -> dict[str, Vector]:
        """The vectors that requests can name, in the order of their names."""
        with self._lock:
            return dict(sorted(self._named.items()))

    def add(self, name: str, folder: Path) -> Vector:
        """Load a vector under a name; one that has the name already is replaced for requests that come later.

        Raises:
            ArmError: no usable vector of this model, or a name that cannot be one.
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
        """Take a name away.

        Raises:
            ArmError: no vector has it.
        """
        with self._lock:
            self.check(name)
            self._named.pop(name).named = False
        self.sweep()

    def sweep(self) -> None:
        """Delete the versions that nobody can name or uses."""
        with self._lock:
            for vector in [vector for vector in self._all if not vector.named and not vector.uses]:
                if len(self._all) == 1:  # PEFT needs an adapter; without one the model is a plain one again
                    self.model = self.model.unload().eval()
                else:
                    self.model.delete_adapter(vector.adapter)
                self._all.remove(vector)

    def check(self, name: str, strength: float = 1.0) -> None:
        """Raise an ArmError unless a request may name this vector at this strength."""
        with self._lock:
            vector = self._named.get(name)
            if vector is None:
                names = sorted(self._named)
                raise ArmError(f"vector={shown(name)} is none of {names}.{nearest(name, names)}")
            check_strength(self.model, strength, vector.adapter)

    def hold(self, names: list[str]) -> list[Vector]:
        """The current versions of some vectors, which stay until `release`.

        Raises:
            ArmError: a name is none.
        """
        with self._lock:
            for name in names:
                self.check(name)
            vectors = [self._named[name] for name in names]
            for vector in vectors:
                vector.uses += 1
            return vectors

    def release(self, vectors: list[Vector]) -> None:
        """The answer that held these versions is complete."""
        with self._lock:
            for vector in vectors:
                vector.uses -= 1

    @property
    def unused(self) -> bool:
        """Whether `sweep` has something to delete."""
        with self._lock:
            return any(not vector.named and not vector.uses for vector in self._all)


def _strength(folder: Path) -> dict[str, Any] | None:
    """What a vector's file says about strength.

    Raises:
        ArmError: it describes other weights.
    """
    try:
        values = read_description(folder)
    except ValueError as error:
        raise ArmError(str(error)) from error
    return None if values is None else values["strength"]


def check_vector_name(name: str) -> None:
    """Refuse a name that cannot stand in a model name such as `base+careful@1.5`.

    Raises:
        ArmError: it is empty or too long, or holds something else than letters, digits, "_" and "-".
    """
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII) or len(name) > _LONGEST_NAME:
        raise ArmError(
            f"{shown(name)} cannot name a vector. Use letters (a-z), digits, '_' and '-', {_LONGEST_NAME} at most, "
            "without '@', '+' and '.'."
        )
    try:
        check_adapter_name(name)
    except ValueError as error:
        raise ArmError(str(error)) from error
