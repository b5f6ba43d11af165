"""Launch configurations of accelerate, under TRL's names.

accelerate launch --config_file recipes/accelerate_configs/zero2.yaml recipes/train.py
accelerate launch --config_file "$(python -m steertune.recipes.accelerate_configs zero2)" -m steertune.recipes.train
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The configurations there are."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """The file of a configuration.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in names():
        raise ValueError(f"Unknown accelerate configuration {name!r}; there are {names()}.")
    return FOLDER / f"{name}.yaml"
