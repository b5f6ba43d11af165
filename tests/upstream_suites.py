"""PEFT's own tests, for LoRA and for our method side by side: `python tests/upstream_suites.py`.

The tests come from PEFT's source distribution of the installed version (pip downloads it, or `--folder` names where
it is unpacked); `upstream_plugin.py` says what is put in place of what. Writes `upstream_suites.md`, and fails where
something passes for LoRA and not for ours without a reason that stands in `BY_DESIGN`. With `--log`, a run that was
interrupted goes on behind its last whole file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from upstream_plugin import LOG, make_cache, subject_of

HERE = Path(__file__).parent
FILES = ("custom_models", "config", "decoder_models", "seq_classifier")
COLUMNS = ("passed", "failed", "skipped", "hub")
# test, message, why: what passes for LoRA and is not meant to pass for ours
BY_DESIGN = [
    ("pickle", "is a pickle", "weights are read from safetensors alone: a pickle can run code"),
    (
        "autocast",
        "AssertionError|assert False",
        "vectors are fp32 whatever the base: bf16 would lose small steps",
    ),
    ("", "not merged|merging is refused", "merging is refused: few architectures have a weight that can carry it"),
    ("bias_raises|learnable_bias", "bias", "there is no argument `bias`"),
    ("weighted_combination", "not applicable", "`add_weighted_adapter` is for LoRA and IA3"),
    ("layer_indexing.*ours-bias", "", "the default is one layer: naming one does not make it fewer"),
    ("layers_to_transform", "unexpected keyword", "the field is called `layers`"),
]
_HUB = re.compile(r"(?i)offline|huggingface\.co|can't find '|couldn't connect|localentrynotfound|not a local folder")
_PAGE = """# PEFT's own tests (peft {peft}, transformers {transformers})

Written by `python tests/upstream_suites.py`. Nothing of upstream's is edited: `upstream_plugin.py` puts LoRA and our
method in place of its lists of configurations, a tiny Llama in place of its MLP, and tiny random models in a cache.
Ours run as `bias` (one layer), `gated` (all layers) and `low_rank` (two layers), and with `modules_to_save`, so there
are more of them than of LoRA.

| file of PEFT's tests | | passed | failed | skipped | needs the Hub |
|---|---|---|---|---|---|
{counts}

## Passes for LoRA, not for ours

| test | | why |
|---|---|---|
{apart}

Left out: tests of one method by name, of prompts, and of layers that no decoder has (embeddings, convolutions);
encoder-decoder models, which are refused; feature extraction by encoders; files that need the Hub throughout. The
source distributions of TRL and transformers hold no tests of their trainers: `test_trainers_parents.py` stands in.
"""


def download(folder: Path) -> Path:
    """PEFT's source distribution, unpacked below `folder`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
    subprocess.run([*command, f"peft=={version('peft')}", "-d", str(folder)], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("peft-*") if path.is_dir())


def run(source: Path, name: str, selection: str, place: Path) -> list[list[str]]:
    """Run a file of PEFT's tests; per test its id, outcome and message."""
    suite, hub, log = place / "suite", place / "hub", place / f"{name}.jsonl"
    if not suite.exists():
        make_cache(hub)
        shutil.copytree(source / "tests", suite / "tests")
        (suite / "tests" / "__init__.py").touch()  # the distribution leaves out what makes its tests a package
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    surroundings = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, LOG: str(log)}
    plain = "-p upstream_plugin -p no:cacheprovider -p no:xdist -o addopts= -q --tb=no -W ignore".split()
    command = [sys.executable, "-m", "pytest", f"tests/test_{name}.py", *plain, "-k", selection]
    subprocess.run(command, cwd=suite, env={**os.environ, **surroundings}, check=False)
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def reason(node: str, message: str) -> str | None:
    """Why this is not to pass for ours; None: it should."""
    name = node.partition("::")[2]
    return next((why for test, said, why in BY_DESIGN if re.search(test, name) and re.search(said, message)), None)


def apart(lines: list[list[str]]) -> dict[str, list[tuple[str, str, str]]]:
    """What passes for LoRA and not for ours, by reason ("" for none): test, outcome, message."""
    passed = {_same(node) for node, outcome, _ in lines if _control(node) and outcome == "passed"}
    found: dict[str, list[tuple[str, str, str]]] = {}
    for node, outcome, message in lines:
        if not _control(node) and outcome != "passed" and _same(node) in passed:
            found.setdefault(reason(node, message) or "", []).append((node, outcome, message))
    return found


def _same(node: str) -> str:
    """A test's id with the method's name and form left out of its subject."""
    subject = subject_of(node) or ""
    return node.replace(subject, "*" + "-".join(set(subject.split("-")) & {"saved", "same", "different"}))


def _control(node: str) -> bool:
    return (subject_of(node) or "").startswith("lora")


def table(lines: list[list[str]]) -> str:
    """The page: what passes for LoRA and for ours by file, and everything that passes for LoRA alone."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for node, outcome, message in lines:
        key = node.partition("::")[0].rpartition("/")[2], "LoRA" if _control(node) else "ours"
        kind = "hub" if outcome == "failed" and _HUB.search(message) else outcome
        counts.setdefault(key, Counter())[kind] += 1
    for who in ("LoRA", "ours"):
        counts["**all**", who] = sum((c for key, c in counts.items() if key[1] == who), Counter())
    rows = [[*key, *(str(found[kind]) for kind in COLUMNS)] for key, found in counts.items()]
    lost = []
    for why, tests in sorted(apart(lines).items()):
        names = Counter((node.rpartition("::")[2].partition("[")[0], outcome) for node, outcome, _ in tests)
        lost += [[f"`{n}`", f"{k} {outcome}", why or "**defect**"] for (n, outcome), k in sorted(names.items())]
    written = ["\n".join("| " + " | ".join(row) + " |" for row in part) for part in (rows, lost)]
    versions = {name: version(name) for name in ("peft", "transformers")}
    return _PAGE.format(counts=written[0], apart=written[1], **versions)


def main() -> int:
    """Run the tests; write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(FILES), help=f"of {FILES}; with fewer, the page is printed")
    parser.add_argument("--folder", type=Path, help="PEFT's unpacked source distribution; left out: pip downloads it")
    parser.add_argument("--log", type=Path, help="keeps outcomes, as JSON; files that are in it are not run again")
    parser.add_argument("-k", default="", help="as for pytest; with it the page is printed")
    options = parser.parse_args()
    found: dict[str, list[list[str]]] = {}
    if options.log is not None and options.log.is_file():
        found = json.loads(options.log.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source = options.folder.resolve() if options.folder else None
        for file in [file for file in options.files if file not in found]:
            source = source or download(place)
            found[file] = run(source, file, options.k, place)
            if options.log is not None:
                options.log.write_text(json.dumps(found), encoding="utf-8")
    if empty := [file for file in options.files if not found[file]]:
        raise SystemExit(f"No test of {empty} ran; see pytest's words above.")
    lines = [line for file in options.files for line in found[file]]
    wrong = apart(lines).get("", [])
    for node, outcome, message in wrong:
        print(f"{node} {outcome}: {message}")
    if options.k or set(options.files) != set(FILES):
        print(table(lines))
    else:
        (HERE / "upstream_suites.md").write_text(table(lines), encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
