"""What a loss needs from the trainer, as one value."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

Strength = float | Literal["null"]
Unit = Literal["example", "token"]


@dataclass(frozen=True)
class Needs:
    """What a loss needs. The trainer reads it before training, to refuse unsuitable data and to compute things once.

    Attributes:
        pairs: Whether it compares chosen with rejected answers. If not, it gets only the chosen half of a pair batch.
        unit: What its values are averaged over, in the whole optimiser step: examples (rows, or pairs) or labelled
            tokens.
        reference: Whether it calls `at(0)`.
        strengths: The strengths other than 0 and 1 that it may call `at` with.
        views: The views that it calls `at` with.
        states: Whether it reads hidden states.
        stops: Whether training ends once it is 0 on every example.
        separable: Whether a pair's value is a term of its chosen answer plus a term of its rejected answer.
    """

    pairs: bool = True
    unit: Unit = "example"
    reference: bool = False
    strengths: tuple[Strength, ...] = ()
    views: tuple[str, ...] = ()
    states: bool = False
    stops: bool = False
    separable: bool = False


class SingleAttributes:
    """Keeps single attributes (`pairs = False`) working for one release, in subclasses and for readers of a loss."""

    needs: Needs

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        names = [need.name for need in fields(Needs) if need.name in vars(cls)]
        if names and "needs" not in vars(cls):
            arguments = ", ".join(f"{name}=..." for name in names)
            warnings.warn(
                f"{cls.__name__} declares {', '.join(names)} as single attributes, which the next release ignores. "
                f"Declare `needs = Needs({arguments})` instead.",
                FutureWarning,
                stacklevel=2,
            )
            type.__setattr__(cls, "needs", _Collected(cls, names))

    if not TYPE_CHECKING:  # for a type checker, a loss does not have every attribute

        def __getattr__(self, name: str) -> Any:
            if name not in Needs.__dataclass_fields__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warnings.warn(f"`loss.{name}` is now `loss.needs.{name}`.", FutureWarning, stacklevel=2)
            return getattr(self.needs, name)


class _Collected:
    """A descriptor: the needs of the parent class, changed by the single attributes that `owner` declares."""

    def __init__(self, owner: type[SingleAttributes], names: list[str]) -> None:
        self.owner, self.names = owner, names

    def __get__(self, loss: SingleAttributes | None, kind: type) -> Any:
        if loss is None:
            return self
        inherited: Any = super(self.owner, loss)
        return replace(inherited.needs, **{name: getattr(loss, name) for name in self.names})
