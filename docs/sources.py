"""Where mkdocstrings finds the code: it reads files, and does not follow editable installs of namespace packages."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_startup(**kwargs: Any) -> None:
    """Make `typings/steertune/`, which pyright looks at too: a link to each folder of the package."""
    home = ROOT / "typings" / "steertune"
    home.mkdir(parents=True, exist_ok=True)
    for folder in ("adapters", "losses", "trainers", "recipes"):
        link = home / folder
        if not link.is_symlink():
            link.symlink_to(Path("../..") / folder, target_is_directory=True)
