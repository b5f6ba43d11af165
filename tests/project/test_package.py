"""What the package promises about itself: one-way imports, quick imports, a wheel that holds everything."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import import_graph
import networkx
import pytest
import readme
from paths import ROOT

from steertune import losses
from steertune.adapters import directions

MAY_IMPORT = {
    "adapters": {"adapters"},
    "losses": {"losses"},
    "trainers": {"trainers", "adapters", "losses"},
    "recipes": {"recipes", "trainers", "adapters", "losses"},
}


GRAPH = import_graph.graph()


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str) -> None:
    for name, other in GRAPH.edges:
        if name.split(".")[1] == folder:
            assert other.split(".")[1] in MAY_IMPORT[folder], f"{name} imports {other}"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_modules_import_each_other_in_a_circle(folder: str) -> None:
    circles = [sorted(names) for names in networkx.strongly_connected_components(GRAPH) if len(names) > 1]
    assert [names for names in circles if names[0].split(".")[1] == folder] == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_private_modules_are_imported_in_their_own_package_only(folder: str) -> None:
    for name, other in GRAPH.edges:
        package, _, last = other.rpartition(".")
        if last.startswith("_") and name.split(".")[1] == folder:
            assert f"{name}.".startswith(f"{package}."), f"{name} imports {other}"


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
    for heading, files in (("loss", losses.names()), ("direction", directions.names())):
        assert len(readme.rows(heading)) >= 8 and readme.rows(heading) <= {*files}


@pytest.mark.parametrize("folder", ["losses", "adapters/directions"])
def test_every_loss_and_direction_describes_itself(folder: str) -> None:
    """The reference pages show the file's own words, so that a new file needs no entry elsewhere."""
    for file in (ROOT / folder).glob("[!_]*.py"):
        first, *_ = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()
        assert first.endswith((".", ":")), file


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
        "recipes/lab/pages/page.html.jinja",
        "recipes/zoo/warm/adapter_model.safetensors",
        "recipes/zoo/warm/trained_on.json",
    ):
        assert (tmp_path / "site" / "steertune" / inside).is_file(), inside
    assert list((tmp_path / "site" / "steertune" / "recipes" / "tasks").glob("*/train.jsonl"))
    assert not list((tmp_path / "site").rglob("*.parquet")), "results of studies stay outside"
    assert not list((tmp_path / "site").glob("adapters*")), "top-level names would overwrite other people's packages"
