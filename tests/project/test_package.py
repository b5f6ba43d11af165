"""What the package promises about itself: one-way imports, quick imports, a wheel that holds everything."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

from steertune.adapters import directions
from steertune.losses import names

MAY_IMPORT = {
    "adapters": {"adapters"},
    "losses": {"losses"},
    "trainers": {"trainers", "adapters", "losses"},
    "recipes": {"recipes", "trainers", "adapters", "losses"},
}


def imported_folders(file: Path, folder: str) -> set[str]:
    """Our own top-level folders that a file imports, relative or absolute."""
    found = set()
    depth = len(file.relative_to(ROOT).parts) - 1  # 1 in the folder itself
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add((node.module or "").split(".")[0] if node.level > depth else folder)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steertune."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("steertune.")}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        assert imported_folders(file, folder) <= MAY_IMPORT[folder], file


def test_no_private_upstream_names_are_imported() -> None:
    upstream = ("transformers", "trl", "peft", "accelerate", "datasets")
    for folder in MAY_IMPORT:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(upstream):
                    assert not [a.name for a in node.names if a.name.startswith("_")], file


@pytest.mark.parametrize(
    ("package", "unwanted"),
    [("losses", ["transformers", "peft", "trl"]), ("adapters", ["trl", "sklearn"]), ("trainers", ["trl", "torch"])],
)
def test_importing_is_quick(package: str, unwanted: list[str]) -> None:
    code = f"import sys, steertune.{package}; print([m for m in {unwanted} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_readme_names_losses_and_directions_that_exist() -> None:
    """Pages that name all of them read the folders (`docs/sources.py`); the README's tables may lag behind."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading, files in (("loss", names()), ("direction", directions.names())):
        rows = readme.partition(f"\n| {heading} ")[2].partition("\n\n")[0]
        named = re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)
        assert len(named) >= 8 and {*named} <= {*files}


@pytest.mark.slow
def test_wheel_holds_code_and_data(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for inside in (
        "recipes/configs/arms/vector_dpo.toml",
        "recipes/tasks/neutral.jsonl",
        "adapters/directions/lat.py",
        "losses/py.typed",
    ):
        assert (tmp_path / "site" / "steertune" / inside).is_file(), inside
    assert list((tmp_path / "site" / "steertune" / "recipes" / "tasks").glob("*/train.jsonl"))
    assert not list((tmp_path / "site").glob("adapters*")), "top-level names would overwrite other people's packages"
