"""PEFT's own tests of decoder models, for LoRA and for our method side by side: `python tests/upstream_suites.py`.

The tests come from PEFT's source distribution of the installed version (pip downloads it, or `--folder` names where
it is unpacked). The models they ask the hub for are made here: tiny random ones in a hub cache of their own, so that
nothing but the list of configurations is changed. Writes `upstream_suites.md`.

The same file is the pytest plug-in of those runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
COMMAND = "python tests/upstream_suites.py"
_SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", {"n_positions": 128}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", {"n_positions": 128, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", {}),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", {}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", {"head_dim": 8}),
}
_RANDOM = {"task_type": "CAUSAL_LM", "init": "random"}
# what LoRA is given upstream is also random at the start, where a test needs an effect
OURS = [_RANDOM, {**_RANDOM, "form": "low_rank", "rank": 2, "layers": "all"}]


def make_cache(folder: Path) -> None:
    """Tiny random checkpoints, laid out as the hub's cache."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, (kind, changes) in MODELS.items():
        snapshot = folder / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        refs = snapshot.parent.parent / "refs"
        refs.mkdir()
        (refs / "main").write_text(snapshot.name)
        sizes = {**_SIZES, **changes}
        if "n_positions" in sizes:  # the GPTs call sizes by names of their own
            for other in ("max_position_embeddings", "num_key_value_heads", "intermediate_size"):
                del sizes[other]
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(snapshot)


def download(folder: Path) -> Path:
    """PEFT's source distribution, unpacked below `folder`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary=:all:"]
    subprocess.run([*command, f"peft=={version('peft')}", "-d", str(folder)], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("peft-*") if path.is_dir())


# -- the plug-in ------------------------------------------------------------------------------------------------


def _configs() -> list[Any]:
    from peft import LoraConfig

    from steertune.adapters import SteeringVectorConfig

    lora = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "target_modules": None, "lora_dropout": 0.05}
    ours = [pytest.param(SteeringVectorConfig, c, id=f"ours{i}") for i, c in enumerate(OURS)]
    return [pytest.param(LoraConfig, {**lora, "bias": "none"}, id="lora"), *ours]


def pytest_configure(config: Any) -> None:
    """Give the suite its markers, and a name that its helpers import and these tests do not use."""
    if find_spec("diffusers") is None:
        sys.modules["diffusers"] = stub = ModuleType("diffusers")
        stub.StableDiffusionPipeline = object  # pyright: ignore
    for marker in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests that are given a configuration; every model is in the cache."""
    kept = [item for item in items if any(name in item.name for name in ("lora-", "lora]", "ours"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES.update(dict.fromkeys(MODELS, 0))  # pyright: ignore


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: Any) -> None:
    """Put LoRA and ours in place of the configurations."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if mark.args[0] == "config_cls,config_kwargs" and len(mark.args[1]) > 8:  # the list of all configurations
            mark.args[1][:] = _configs()


def pytest_runtest_logreport(report: Any) -> None:
    """One line a test, for the table."""
    if report.when == "call" or report.outcome != "passed":
        why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr or "")
        with open(os.environ["STEERTUNE_UPSTREAM_LOG"], "a") as file:
            crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", why)
            file.write(json.dumps([report.nodeid.split("::")[-1], report.outcome, crash[:300]]) + "\n")


# -- the table --------------------------------------------------------------------------------------------------


def table(lines: list[list[str]]) -> str:
    """Markdown: per test what LoRA and ours give, summed over the models."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for node, outcome, _ in lines:
        test, _, rest = node.partition("[")
        who = "lora" if "lora" in rest else "ours"
        counts.setdefault(test, {"lora": Counter(), "ours": Counter()})[who][outcome] += 1

    def cell(counter: Counter[str]) -> str:
        return ", ".join(f"{counter[k]} {k}" for k in ("passed", "failed", "skipped") if counter[k]) or "-"

    sums = {who: sum((c[who] for c in counts.values()), Counter()) for who in ("lora", "ours")}
    rows = [f"| {test} | {cell(c['lora'])} | {cell(c['ours'])} |" for test, c in sorted(counts.items())]
    head = ["| test of PEFT | LoRA | ours |", "|---|---|---|"]
    return "\n".join([*head, *rows, f"| **all** | {cell(sums['lora'])} | {cell(sums['ours'])} |"]) + "\n"


def main() -> int:
    """Run PEFT's tests of decoder models; write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="PEFT's unpacked source distribution; left out: pip downloads it")
    parser.add_argument("-k", default="", help="as for pytest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        folder = (options.folder or download(temporary)).resolve()
        make_cache(temporary / "hub")
        log = temporary / "log.jsonl"
        paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        suite = temporary / "suite"  # the distribution leaves out what makes its tests a package
        shutil.copytree(folder / "tests", suite / "tests")
        (suite / "tests" / "__init__.py").touch()
        surroundings = {"HF_HUB_CACHE": str(temporary / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        tests = ["tests/test_decoder_models.py", "-p", "upstream_suites", "-q", "--tb=short", "-k", options.k]
        plain = ["-o", "addopts=", "-n", "0", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *tests, *plain]
        variables = {**os.environ, **surroundings, "STEERTUNE_UPSTREAM_LOG": str(log)}
        subprocess.run(command, cwd=suite, env=variables, check=False)
        if not log.is_file():
            raise SystemExit("No test of PEFT's ran; see pytest's words above.")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    for node, outcome, why in lines:
        if outcome == "failed":
            print(f"{node}: {why}")
    (HERE / "upstream_suites.md").write_text(table(lines))
    return int(any(outcome == "failed" and "ours" in node for node, outcome, _ in lines))


if __name__ == "__main__":
    sys.exit(main())
