"""PEFT's and TRL's own tests, as they are and with ours: `python tests/project/upstream_suites.py --trl FOLDER`.

PEFT's tests come from its source distribution of the installed version (pip downloads it, or `--folder` names where
it is unpacked); TRL's distribution has none, so `--trl` names the folder of its public source (a git tree).
`upstream_plugin.py` (PEFT) and `upstream_trl.py` (TRL) say what is put in place of what. Writes `upstream_suites.md`,
and fails where something passes for upstream and not for ours without a reason that stands in `BY_DESIGN` or
`TRL_BY_DESIGN`. With `--log`, a run that was interrupted goes on behind its last whole file.
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
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = HERE.parent / "helpers"
sys.path.insert(0, str(HELPERS))

from upstream_plugin import LOG, make_cache, subject_of  # noqa: E402
from upstream_trl import FROZEN, SUBJECTS, WHO, make_trl_cache  # noqa: E402

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
    (
        "",
        "cannot be merged|merging is refused",
        "merging is refused: few architectures have a weight that can carry it",
    ),
    ("bias_raises|learnable_bias", "bias", "there is no argument `bias`"),
    ("weighted_combination", "not applicable", "`add_weighted_adapter` is for LoRA and IA3"),
    ("layer_indexing.*ours-bias", "", "the default is one layer: naming one does not make it fewer"),
    ("layers_to_transform", "unexpected keyword", "the field is called `layers`"),
]
_HEAD = 'PEFT trains a copy of a classifier\'s head and keeps the original, for LoRA with `task_type="SEQ_CLS"` too'
TRL_BY_DESIGN = [
    ("_peft_|_peft", "score.original_module.weight has not changed", _HEAD),
    ("sync_ref_model", "while using a PEFT model", "TRL refuses `sync_ref_model` for every PEFT model"),
    (
        "after_training_raises",
        "DID NOT RAISE",
        "with an adapter the reference is the base, which training does not change: it can be computed at any time",
    ),
    (
        "dropped",
        "rows have no label left",
        "rows of a data set that are cut before their first label are refused, not dropped unsaid",
    ),
    ("template_from_model", "cannot train embeddings", "TRL adds and trains tokens then, which a vector cannot"),
]
_HUB = re.compile(r"(?i)offline|huggingface\.co|can't find '|couldn't connect|localentrynotfound|not a local folder")
_PAGE = """# PEFT's and TRL's own tests

Written by `python tests/project/upstream_suites.py --trl FOLDER` for peft {peft}, trl {trl} and
transformers {transformers}. Nothing of upstream's is edited.

## PEFT

The tests of its source distribution {peft}. `upstream_plugin.py` puts LoRA and our method in place of its lists of
configurations, a tiny Llama in place of its MLP, and tiny random models in a cache. Ours run as `bias` (one layer),
`gated` (all layers) and `low_rank` (two layers), and with `modules_to_save`, so there are more of them than of LoRA.

| file of PEFT's tests | | passed | failed | skipped | needs the Hub |
|---|---|---|---|---|---|
{counts}

### Passes for LoRA, not for ours

| test | | why |
|---|---|---|
{apart}

Left out: tests of one method by name, of prompts, and of layers that no decoder has (embeddings, convolutions);
encoder-decoder models, which are refused; feature extraction by encoders; files that need the Hub throughout.

## TRL

The tests of its trainers from the source tree {source},
run against the installed {trl}. Where the two differ, a test can fail for TRL itself; it is not counted against ours.
`upstream_trl.py` puts in place tiny random models and tokenizers in a cache, 19 made-up rows in each of TRL's formats
of data, and, by row of this table,

* *TRL*: nothing else;
* *ours*: `SteeringDPOTrainer` and `SteeringSFTTrainer`, with the `peft_config` of the test (none: full finetuning);
* *a vector*: the same with a steering vector in place of LoRA and of full finetuning, in `RewardTrainer` (which stays
  TRL's own) in place of LoRA alone. Training must change all of what is trained and nothing else. Most tests then ask
  that every weight of the model has changed. That stops them behind their training, and is counted apart.

| file of TRL's tests | | passed | failed | skipped | base stays frozen |
|---|---|---|---|---|---|
{trl_counts}

### Passes for TRL, not for ours

| test | | | why |
|---|---|---|---|
{trl_apart}

Left out: images, vLLM, Liger, FlashAttention, quantised models, remote code, tests that are slow or need a GPU,
architectures without a tiny model here, and the tests of what is not a trainer (collators, TRL's chunked loss). The
tests of transformers' `Trainer` are not run: `tests/trainers/test_parents.py` stands in.
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
    suite, hub = place / "suite", place / "hub"
    if not suite.exists():
        make_cache(hub)
        shutil.copytree(source / "tests", suite / "tests")
        (suite / "tests" / "__init__.py").touch()  # the distribution leaves out what makes its tests a package
    return _outcomes(suite, f"tests/test_{name}.py", "upstream_plugin", selection, {"HF_HUB_CACHE": str(hub)})


def run_trl(source: Path, name: str, subject: str, selection: str, place: Path) -> list[list[str]]:
    """Run a file of TRL's tests for one of SUBJECTS; per test its id, outcome and message."""
    suite, hub = place / "trl", place / "trl_hub"
    if not suite.exists():
        make_trl_cache(hub)
        shutil.copytree(source / "tests", suite / "tests")  # without the package beside them: the installed one counts
    settings = {"HF_HUB_CACHE": str(hub), WHO: subject}
    return _outcomes(suite, f"tests/test_{name}.py", "upstream_trl", selection, settings)


def _outcomes(suite: Path, file: str, plugin: str, selection: str, settings: dict[str, str]) -> list[list[str]]:
    log = suite / "outcomes.jsonl"
    log.unlink(missing_ok=True)
    paths = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, LOG: str(log), **settings}
    plain = f"-p {plugin} -p no:cacheprovider -p no:xdist -o addopts= -q --tb=no -W ignore".split()
    command = [sys.executable, "-m", "pytest", file, *plain, "-k", selection]
    subprocess.run(command, cwd=suite, env=surroundings, check=False)
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def reason(node: str, message: str, reasons: list[tuple[str, str, str]]) -> str | None:
    """Why this is not to pass for ours; None: it should."""
    name = node.partition("::")[2]
    return next((why for test, said, why in reasons if re.search(test, name) and re.search(said, message)), None)


def apart(lines: list[list[str]]) -> dict[str, list[tuple[str, str, str]]]:
    """What passes for LoRA and not for ours, by reason ("" for none): test, outcome, message."""
    passed = {_same(node) for node, outcome, _ in lines if _control(node) and outcome == "passed"}
    found: dict[str, list[tuple[str, str, str]]] = {}
    for node, outcome, message in lines:
        if not _control(node) and outcome != "passed" and _same(node) in passed:
            found.setdefault(reason(node, message, BY_DESIGN) or "", []).append((node, outcome, message))
    return found


def _same(node: str) -> str:
    """A test's id with the method's name and form left out of its subject."""
    subject = subject_of(node) or ""
    return node.replace(subject, "*" + "-".join(set(subject.split("-")) & {"saved", "same", "different"}))


def _control(node: str) -> bool:
    return (subject_of(node) or "").startswith("lora")


def tables(lines: list[list[str]]) -> tuple[str, str]:
    """What passes for LoRA and for ours by file, and everything that passes for LoRA alone."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for node, outcome, message in lines:
        key = node.partition("::")[0].rpartition("/")[2], "LoRA" if _control(node) else "ours"
        kind = "hub" if outcome == "failed" and _HUB.search(message) else outcome
        counts.setdefault(key, Counter())[kind] += 1
    for who in ("LoRA", "ours"):
        counts["**all**", who] = sum((c for key, c in counts.items() if key[1] == who), Counter())
    lost = []
    for why, tests in sorted(apart(lines).items()):
        names = Counter((node.rpartition("::")[2].partition("[")[0], outcome) for node, outcome, _ in tests)
        lost += [[f"`{n}`", f"{k} {outcome}", why or "**defect**"] for (n, outcome), k in sorted(names.items())]
    return _rows([*key, *(str(found[kind]) for kind in COLUMNS)] for key, found in counts.items()), _rows(lost)


def trl_apart(found: dict[str, list[list[str]]]) -> list[tuple[str, str, str, str]]:
    """What passes for TRL and not for ours: subject, test, message, reason ("" for none)."""
    lost = []
    for name, subjects in SUBJECTS.items():
        passed = {node for node, outcome, _ in found.get(f"control {name}", []) if outcome == "passed"}
        for subject in subjects[1:]:
            for node, outcome, message in found.get(f"{subject} {name}", []):
                if node in passed and trl_kind(subject, outcome, message) in ("failed", "skipped"):
                    lost.append((subject, node, message, reason(node, message, TRL_BY_DESIGN) or ""))
    return lost


def trl_kind(subject: str, outcome: str, message: str) -> str:
    """An outcome; "frozen" for a test that stops because a vector leaves the base's weights as they are."""
    return "frozen" if subject == "vector" and outcome == "failed" and FROZEN.match(message) else outcome


def trl_tables(found: dict[str, list[list[str]]]) -> tuple[str, str]:
    """What passes for TRL and for ours by file, and everything that passes for TRL alone."""
    names = {"control": "TRL", "ours": "ours", "vector": "a vector"}
    rows = []
    for name, subjects in SUBJECTS.items():
        for subject in subjects:
            kinds = Counter(trl_kind(subject, *line[1:]) for line in found.get(f"{subject} {name}", []))
            counts = [str(kinds[kind]) for kind in ("passed", "failed", "skipped", "frozen")]
            rows.append([f"test_{name}.py", names[subject], *counts])
    lost = Counter(
        (node.partition("::")[0].rpartition("/")[2], node.rpartition("::")[2].partition("[")[0], names[subject], why)
        for subject, node, _, why in trl_apart(found)
    )
    told = [[f"{f}: `{test}`", who, str(k), why or "**defect**"] for (f, test, who, why), k in sorted(lost.items())]
    return _rows(rows), _rows(told)


def _rows(cells: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def commit_of(source: Path) -> str:
    """What is known of the version of a source tree: VERSION, and the commit where it is a git tree."""
    said = (source / "VERSION").read_text().strip() if (source / "VERSION").is_file() else "an unnamed version"
    asked = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return f"{said}, commit {asked.stdout.strip()}" if asked.returncode == 0 else said


def collect(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Outcomes by file of PEFT's tests, and by subject and file of TRL's; those in the log are not run again."""
    found: dict[str, list[list[str]]] = {}
    if options.log is not None and options.log.is_file():
        found = json.loads(options.log.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source = options.folder.resolve() if options.folder else None
        trl = [(f"{subject} {file}", file, subject) for file, who in SUBJECTS.items() for subject in who]
        for key, file, subject in [*((file, file, "") for file in options.files), *(trl if options.trl else [])]:
            if key in found:
                continue
            if subject:
                found[key] = run_trl(options.trl.resolve(), file, subject, options.k, place)
            else:
                source = source or download(place)
                found[key] = run(source, file, options.k, place)
            if options.log is not None:
                options.log.write_text(json.dumps(found), encoding="utf-8")
    if empty := [key for key, lines in found.items() if not lines and not options.k]:
        raise SystemExit(f"No test of {empty} ran; see pytest's words above.")
    return found


def main() -> int:
    """Run the tests; write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(FILES), help=f"PEFT's, of {FILES}; left out: all")
    parser.add_argument("--folder", type=Path, help="PEFT's unpacked source distribution; left out: pip downloads it")
    parser.add_argument("--trl", type=Path, help="TRL's source, as a git tree; without it the page is printed")
    parser.add_argument("--log", type=Path, help="keeps outcomes, as JSON; files that are in it are not run again")
    parser.add_argument("-k", default="", help="as for pytest; with it, or with fewer files, the page is printed")
    options = parser.parse_args()
    found = collect(options)
    lines = [line for file in options.files for line in found[file]]
    wrong = apart(lines).get("", [])
    wrong += [(f"{who}: {node}", "failed", message) for who, node, message, why in trl_apart(found) if not why]
    for node, outcome, message in wrong:
        print(f"{node} {outcome}: {message}")
    counts, lost = tables(lines)
    trl_counts, trl_lost = trl_tables(found)
    versions = {name: version(name) for name in ("peft", "trl", "transformers")}
    source = commit_of(options.trl) if options.trl else "no source, which was not given"
    filled = {"counts": counts, "apart": lost, "trl_counts": trl_counts, "trl_apart": trl_lost, "source": source}
    page = _PAGE.format(**filled, **versions)
    if options.k or set(options.files) != set(FILES) or not options.trl:
        print(page)
    else:
        (HERE / "upstream_suites.md").write_text(page, encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
