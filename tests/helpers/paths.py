"""Where things are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
ROOT = TESTS.parent


def module_at(path: Path) -> ModuleType:
    """A file outside of the package as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
