"""What holds for any input: masks of positions, views, nested subsets, statistics, and files that a bit changed in."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_data
import torch
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tiny_models import steered
from transformers import DynamicCache

from steertune.adapters import SteeringVectorConfig, prompt_length, set_strength
from steertune.adapters.positions import PromptBoundary
from steertune.adapters.saved import check_checksums, write_checksums
from steertune.recipes.ablation.matched import Curve
from steertune.recipes.ablation.statistics.curves import n_equivalence
from steertune.recipes.ablation.statistics.paired import corrected, crossed_interval, p_value
from steertune.recipes.ablation.statistics.shapley import shapley
from steertune.recipes.lab.files import ArmError, read_result, read_rows, write_result, write_rows
from steertune.recipes.lab.intervals import interval
from steertune.recipes.lab.splits import Splits
from steertune.trainers import Batch, get_view, tokenise
from steertune.trainers.prefix.store import TensorStore
from steertune.trainers.views import Views

# the same examples in every run, few enough for a small machine
settings.register_profile(
    "stable", derandomize=True, deadline=None, max_examples=30, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("stable")
POSITIONS = ("all", "completion", "prompt", "last_prompt")

# -- positions ------------------------------------------------------------------------------------------------------

row = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
"""Padding on the left, tokens of the prompt, of the completion, and padding on the right."""


def same_width(rows: list[tuple[int, int, int, int]], right: bool) -> list[tuple[int, int, int, int]]:
    """The rows with more padding, on one side or the other."""
    width = max(map(sum, rows))
    return [(r[0], *r[1:3], r[3] + width - sum(r)) if right else (r[0] + width - sum(r), *r[1:]) for r in rows]


def batch_of(rows: list[tuple[int, int, int, int]]) -> dict[str, torch.Tensor]:
    parts = [(0, 0), (1, 1), (2, 1), (0, 0)]  # kind of token, and whether it is real
    kinds = torch.tensor([[k for (k, _), n in zip(parts, r, strict=True) for _ in range(n)] for r in rows])
    return {"kinds": kinds, "mask": (kinds > 0).long(), "labels": torch.where(kinds == 2, 5, -100)}


def oracle(positions: str, kinds: torch.Tensor) -> list[list[bool]]:
    """Which real tokens are steered, said token by token."""
    found = []
    for tokens in kinds.tolist():
        last = max(i for i, kind in enumerate(tokens) if kind == 1)
        which = {"all": (1, 2), "prompt": (1,), "completion": (2,)}.get(positions)
        found.append([i == last if which is None else kind in which for i, kind in enumerate(tokens)])
    return found


def seen(boundary: PromptBoundary, positions: Any, columns: int) -> torch.Tensor | None:
    mask = boundary.mask(positions, torch.zeros(1, columns, 4))
    return None if mask is None else mask[..., 0]


MODEL = torch.nn.Identity().eval()  # whose forward passes a boundary is told of


@given(st.lists(row, min_size=1, max_size=4), st.booleans(), st.sampled_from(POSITIONS[1:]))
def test_masks_are_what_the_tokens_say(rows, right, positions):
    batch = batch_of(same_width(rows, right))
    boundary = PromptBoundary()
    boundary.before_forward(
        MODEL, (), {"input_ids": batch["kinds"], "attention_mask": batch["mask"], "labels": batch["labels"]}
    )
    mask = seen(boundary, positions, batch["kinds"].shape[1])
    real = batch["mask"].bool()
    assert (mask.expand_as(real) & real).tolist() == oracle(positions, batch["kinds"])


@given(st.lists(row, min_size=1, max_size=3), st.sampled_from(POSITIONS), st.data())
def test_parts_through_a_cache_are_the_whole(rows, positions, data):
    """As in generation: prompts padded on the left to one width, then any number of tokens at a time."""
    longest = max(r[0] + r[1] for r in rows)
    rows = [(longest - r[1], r[1], rows[0][2], 0) for r in rows]
    batch = batch_of(rows)
    width = batch["kinds"].shape[1]
    cuts = (
        sorted(data.draw(st.sets(st.integers(longest, width - 1), max_size=3)) | {longest}) if width > longest else []
    )
    parts, boundary = [], PromptBoundary()
    boundary.declared = longest
    for start, end in itertools.pairwise([0, *cuts, width]):
        cache = SimpleNamespace(get_seq_length=lambda start=start: start)
        given_mask = batch["mask"][:, :end]
        boundary.before_forward(
            MODEL, (),
            {"input_ids": batch["kinds"][:, start:end], "attention_mask": given_mask, "past_key_values": cache},
        )  # fmt: skip
        mask = seen(boundary, positions, end - start)
        parts.append(torch.ones(len(rows), end - start, dtype=torch.bool) if mask is None
                     else mask.expand(len(rows), -1))  # fmt: skip
    real = batch["mask"].bool()
    assert (torch.cat(parts, dim=1) & real).tolist() == oracle(positions, batch["kinds"])


@settings(max_examples=8)
@given(st.integers(1, 4), st.sets(st.integers(1, 8), max_size=3), st.sampled_from(POSITIONS))
def test_logits_through_a_cache_are_those_of_the_whole(prompt, cuts, positions):
    model = MODELS.setdefault(positions, steered(positions=positions))
    ids = torch.arange(3, 12)[None]
    # the prompt goes in as one part, as in generation
    ends = sorted({prompt, *(cut for cut in cuts if cut > prompt), ids.shape[1]})
    with torch.no_grad(), set_strength(model, 3.0), prompt_length(model, prompt):
        whole = model(input_ids=ids, use_cache=False).logits
        cache, parts = DynamicCache(), []
        for start, end in itertools.pairwise([0, *ends]):
            parts.append(model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)


MODELS: dict[str, Any] = {}

# -- views and subsets ----------------------------------------------------------------------------------------------

words = st.lists(st.sampled_from(tiny_data.WORDS), min_size=1, max_size=4).map(" ".join)
examples = st.lists(
    st.tuples(words, words, words).filter(lambda row: row[1] != row[2]),
    min_size=1,
    max_size=4,
    unique_by=lambda r: r[0],
)


@settings(max_examples=10)
@given(examples, words, st.data())
def test_a_view_of_any_batch_is_that_of_its_rows(rows, text, data):
    """Whatever the order, the repeats and the padding of a batch."""
    tokenizer = tiny_data.tokenizer()
    pairs = Dataset.from_list([{"prompt": f"{p} ", "chosen": c, "rejected": r} for p, c, r in rows])
    view = get_view("instruction", text=text)
    views, tokenised = Views({"good": view}, tokenizer), tokenise(pairs, tokenizer)
    views.add(pairs, tokenised)
    shown = tokenise(Dataset.from_list(view(pairs.to_list())), tokenizer).to_list()
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    own = tokenised.to_list()
    sides = [(i, side) for side in ("chosen_ids", "rejected_ids") for i in order]
    ids = [own[i]["prompt_ids"] + own[i][side] for i, side in sides]
    width = max(map(len, ids)) + data.draw(st.integers(0, 2))
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    found = views.of("good", Batch({"input_ids": padded, "attention_mask": mask}, padded, pairs=True))
    for k, (i, side) in enumerate(sides):
        real = found.inputs["attention_mask"][k].bool()
        assert found.inputs["input_ids"][k][real].tolist() == shown[i]["prompt_ids"] + shown[i][side]
        assert found.labels[k][found.labels[k] != -100].tolist() == own[i][side]


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.data())
def test_smaller_training_sets_are_beginnings_of_larger_ones(size, seed, data):
    pool = Dataset.from_dict({"row": list(range(size))})
    splits = Splits(pool, pool, pool, pool)
    large = data.draw(st.integers(1, size))
    small = data.draw(st.integers(1, large))
    rows = splits.train(large, seed)["row"][:]
    assert splits.train(small, seed)["row"][:] == rows[:small]
    assert len(set(rows)) == large and set(rows) <= set(range(size))


# -- statistics -----------------------------------------------------------------------------------------------------

number = st.floats(-5, 5).map(lambda x: round(x, 3))
differences = st.lists(number, min_size=2, max_size=7)
matrix = st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(0, 10**6)).map(
    lambda sizes: np.random.default_rng(sizes[2]).normal(size=sizes[:2]).round(3)
)


def ends(found: Any) -> np.ndarray:
    return np.array([found.low, found.estimate, found.high])


@given(differences, st.randoms(use_true_random=False), number)
def test_intervals_follow_their_differences(values, random, shift):
    assume(np.ptp(values) > 0.01)
    found, shuffled = interval(values), random.sample(values, len(values))
    assert ends(interval(shuffled)) == pytest.approx(ends(found))
    assert ends(interval([-v for v in values])) == pytest.approx(-ends(found)[::-1])
    assert ends(interval([v + shift for v in values])) == pytest.approx(ends(found) + shift, abs=1e-9)
    assert ends(interval([3 * v for v in values])) == pytest.approx(3 * ends(found))
    assert found.low <= found.estimate <= found.high
    wider = interval(values, confidence=0.99)
    assert wider.low <= found.low and wider.high >= found.high


@given(matrix, number)
def test_crossed_intervals_follow_their_differences(values, shift):
    found = crossed_interval(values)
    assert ends(crossed_interval(values[::-1])) == pytest.approx(ends(found))
    assert ends(crossed_interval(values[:, ::-1])) == pytest.approx(ends(found))
    assert ends(crossed_interval(-values)) == pytest.approx(-ends(found)[::-1])
    assert ends(crossed_interval(values + shift)) == pytest.approx(ends(found) + shift)
    assert (found.p < 0.05) == found.excludes_zero
    assert 0 <= found.p <= 1


@settings(max_examples=15)
@given(differences, st.randoms(use_true_random=False))
def test_the_permutation_test_counts_all_swaps(values, random):
    p = p_value(values)
    assert 2 / 2 ** len(values) <= p + 1e-12 and p <= 1
    swapped = [abs(round(float(np.mean(signs * np.array(values))), 12))
               for signs in itertools.product([1, -1], repeat=len(values))]  # fmt: skip
    at_least = np.mean([s >= abs(round(float(np.mean(values)), 12)) - 1e-12 for s in swapped])
    assert p == pytest.approx(at_least if any(values) else 1.0)
    assert p_value([-v for v in values]) == pytest.approx(p)
    assert p_value(random.sample(values, len(values))) == pytest.approx(p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_corrected_p_values_only_grow_and_keep_their_order(p_values):
    found = corrected(p_values)
    assert all(raw <= p + 1e-12 <= 1 + 1e-9 for raw, p in zip(p_values, found, strict=True))
    by_raw = [p for _, p in sorted(zip(p_values, found, strict=True))]
    assert by_raw == sorted(by_raw)


@given(st.integers(1, 4), st.integers(0, 10**6))
def test_shapley_shares_add_up_and_who_does_nothing_gets_nothing(count, seed):
    factors = [f"f{i}" for i in range(count)]
    numbers = np.random.default_rng(seed)
    sets = [frozenset(s) for n in range(count + 1) for s in itertools.combinations(factors, n)]
    worth = {s: numbers.normal(size=3) for s in sets}
    found = shapley(worth.__getitem__, factors)
    assert sum(found.values()) == pytest.approx(worth[frozenset(factors)] - worth[frozenset()])
    idle = shapley(lambda s: worth[s - {"idle"}], [*factors, "idle"])
    assert idle.pop("idle") == pytest.approx(np.zeros(3), abs=1e-12)
    assert all(idle[f] == pytest.approx(found[f]) for f in factors)
    double = shapley(lambda s: 2 * worth[s] + len(s), factors)
    assert all(double[f] == pytest.approx(2 * found[f] + 1) for f in factors)


@settings(max_examples=4)
@given(st.integers(0, 10**6), st.floats(0.01, 0.5))
def test_reaching_more_is_worth_no_fewer_examples(seed, more):
    numbers = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([["t"], range(3)], names=["task", "seed"])

    def arrays(height: float) -> pd.Series:
        return pd.Series([numbers.normal(height, 0.1, size=4) for _ in range(3)], index=index, dtype=object)

    baseline = pd.DataFrame({n: arrays(0.1 * math.log(n)) for n in (4, 16, 64)})
    reached = arrays(0.1 * math.log(16))
    low, high = (n_equivalence(baseline, r).estimate for r in (reached, reached.map(lambda x: x + more)))
    assert low <= high
    same = n_equivalence(baseline, reached)
    assert same.low <= same.estimate <= same.high


@given(st.floats(1e-4, 1e3), st.floats(1e-3, 1.0), st.floats(1.5, 2.5))
def test_the_matched_strength_has_the_asked_divergence(slope, target, power):
    found = Curve(lambda s: slope * s**power, 64.0).crossing(target)
    right = (target / slope) ** (1 / power)
    assert found is None if right > 64.0 * 1.05 else found is None or found == pytest.approx(right, rel=0.05)
    assert found is not None or right > 64.0 * 0.95


# -- files ----------------------------------------------------------------------------------------------------------

plain = st.sampled_from(
    [
        {},
        {"version": 3, "key": "5f", "seconds": 1.25, "levels": None, "margins": [0.5, -1e-9, 3]},
        {"prompt": "wie geht’s?", "completion": [{"role": "assistant", "content": "gut\n"}], "a": {"b": [True, {}]}},
        {"nan": [1e300, -0.0], "text": "blake3", "": ""},
    ]
)


def damage(data: bytes, where: float, bit: int, cut: bool) -> bytes:
    """A file that was cut, or in which one bit changed."""
    at = min(int(where * len(data)), len(data) - 1)
    return data[:at] if cut else data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


somewhere = (st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.booleans())


def assert_error_or_itself(file: Path, content, read, where, bit, cut) -> None:
    """Once a file that was read is damaged, reading it is an error or gives the same."""
    assert read(file, "Delete it.") == content
    file.write_bytes(damage(file.read_bytes(), where, bit, cut))
    try:
        again = read(file, "Delete it.")
    except ArmError as error:
        assert "Delete it." in str(error) or "UTF-8" in str(error)
    else:
        assert json.dumps(again, sort_keys=True) == json.dumps(content, sort_keys=True)


@settings(max_examples=120)
@given(plain, *somewhere)
def test_a_damaged_result_is_an_error_or_itself(tmp_path, found, where, bit, cut):
    """Cells, tunings, failures, `grid.json`, and the cells of comparisons and contrast prompts are such files."""
    write_result(tmp_path / "result.json", found)
    assert_error_or_itself(tmp_path / "result.json", found, read_result, where, bit, cut)


@settings(max_examples=80)
@given(st.lists(plain, max_size=3), *somewhere)
def test_damaged_rows_are_an_error_or_themselves(tmp_path, rows, where, bit, cut):
    """Answers that a distillation keeps."""
    write_rows(tmp_path / "rows.jsonl", rows)
    assert_error_or_itself(tmp_path / "rows.jsonl", rows, read_rows, where, bit, cut)


@settings(max_examples=60)
@given(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), *somewhere)
def test_a_damaged_adapter_is_an_error_or_itself(tmp_path, name, where, bit, cut):
    if "adapter" not in SAVED:
        steered(norm="capped", norm_value=5.0).save_pretrained(tmp_path)
        SAVED["adapter"] = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
        SAVED["config"] = SteeringVectorConfig.from_pretrained(str(tmp_path))
    for file, data in SAVED["adapter"].items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / name).write_bytes(damage(SAVED["adapter"][name], where, bit, cut))
    try:
        config = SteeringVectorConfig.from_pretrained(str(tmp_path))
    except ValueError:
        return
    assert name == "adapter_config.json" and config == SAVED["config"]  # white space


SAVED: dict[str, Any] = {}


@settings(max_examples=60)
@given(st.sampled_from(["a.safetensors", "b.json", "c.jsonl", "checksums.json"]), *somewhere)
def test_damaged_checkpoints_and_made_data_are_seen(tmp_path, name, where, bit, cut):
    """Weights and JSON of checkpoints, the adapters of comparisons and contrast prompts, planted models and data."""
    for file in ("a.safetensors", "b.json", "c.jsonl"):
        (tmp_path / file).write_bytes(file.encode() * 20)
    write_checksums(tmp_path)
    check_checksums(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damage(whole, where, bit, cut))
    try:
        check_checksums(tmp_path)
    except ValueError:
        return
    assert json.loads((tmp_path / name).read_text()) == json.loads(whole)  # white space of the checksums


@settings(max_examples=100)
@given(st.sampled_from([".rows", ".index"]), *somewhere)
def test_a_damaged_memo_gives_the_same_tensor_or_none(tmp_path_factory, suffix, where, bit, cut):
    folder = tmp_path_factory.mktemp("memo")
    kept = {
        "a" * 32: torch.arange(8.0),
        "b" * 32: torch.ones(2, 3, dtype=torch.bfloat16),
        "c" * 32: torch.ones(1, 1, 4),
    }
    memo = TensorStore(0.0, folder)
    for key, value in kept.items():
        memo.put(key, value)
    [file] = folder.glob(f"*{suffix}")
    file.write_bytes(damage(file.read_bytes(), where, bit, cut))
    again = TensorStore(0.0, folder)
    for key, value in kept.items():
        found = again.get(key)
        assert found is None or (found.dtype == value.dtype and torch.equal(found, value))


def test_peft_still_saves_the_weights_before_the_configuration(tmp_path):
    """Else there is no checksum in it (`SteeringVectorConfig.save_pretrained`)."""
    steered().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["checksum"].startswith("sha256-")
    assert isinstance(PeftModel.from_pretrained(steered().unload(), tmp_path), PeftModel)
