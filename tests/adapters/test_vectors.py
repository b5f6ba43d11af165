"""Arithmetic on adapter folders: by hand, through PEFT, and what is refused; whether two vectors work together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
import torch
from measuring import margins
from peft import PeftModel, get_peft_model
from tiny_models import fill, steered, tiny, tokens

from steertune.adapters import SteeringVectorConfig, set_strength, steering_layers
from steertune.adapters.analysis import arithmetic
from steertune.adapters.analysis.arithmetic import VectorError, combine, orthogonalise, project_out, read, similarity
from steertune.recipes import vectors
from steertune.recipes.ablation import two_vectors
from steertune.recipes.lab.held_out import held_out_rows
from steertune.recipes.lab.rows import Record


def saved(folder: Path, values: dict[int, list[float]] | None = None, base=None, seed: int = 1, **switches) -> Path:
    """An adapter folder; of given first numbers of the vector of each layer, or of random ones."""
    layers = switches.pop("layers", sorted(values) if values else [1])
    model = get_peft_model(tiny() if base is None else base, SteeringVectorConfig(layers=layers, **switches))
    fill(model, seed=seed)
    for layer in steering_layers(model) if values else []:
        given = (values or {})[layer.layer_index]
        layer.parameter("default", "v").data = torch.tensor(given + [0.0] * (32 - len(given)))
    model.save_pretrained(str(folder))
    return folder


def first(found: arithmetic.Vectors, layer: int = 1, count: int = 2) -> list[float]:
    assert not found.vectors[layer][count:].any()
    return found.vectors[layer][:count].tolist()


def run(*words) -> int:
    return vectors.main([str(word) for word in words])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """a = (1, 2) and b = (3, -1) at layer 1, which are not orthogonal: a·b = 1."""
    home = tmp_path_factory.mktemp("pair")
    return saved(home / "a", {1: [1.0, 2.0]}), saved(home / "b", {1: [3.0, -1.0]})


# -- by hand --------------------------------------------------------------------------------------------------------


def test_sums_by_hand(pair):
    a, b = map(read, pair)
    assert first(combine([a, b], [1, 1])) == [4, 1]
    assert first(combine([a, b], [1, -1])) == [-2, 3]
    assert first(combine([a, b], [0.5, 0.5])) == [2, 0.5]
    assert first(combine([a], [-2])) == [-2, -4]


def test_projections_by_hand(pair):
    a, b = map(read, pair)
    # a - (a·b / b·b) b = (1, 2) - 1/10 (3, -1)
    assert first(project_out(a, [b])) == pytest.approx([0.7, 2.1])
    kept, left = orthogonalise([a, b])
    assert first(kept) == [1, 2]
    # b - (b·a / a·a) a = (3, -1) - 1/5 (1, 2)
    assert first(left) == pytest.approx([2.8, -1.4])
    assert float(kept.vectors[1] @ left.vectors[1]) == pytest.approx(0, abs=1e-6)


def test_the_span_of_vectors_that_are_not_orthogonal_is_taken_out_whole(tmp_path):
    one, *others = (
        read(saved(tmp_path / name, {1: value}))
        for name, value in (("v", [1.0, 2.0, 3.0]), ("x", [1.0, 0.0, 0.0]), ("y", [1.0, 1.0, 0.0]))
    )
    # taking x out and then y would leave (-1, 1, 3): the span of both is the plane of the first two axes
    assert first(project_out(one, others), count=3) == pytest.approx([0, 0, 3], abs=1e-6)
    doubled = project_out(one, [others[0], others[0]])
    assert first(doubled, count=3) == pytest.approx([0, 2, 3], abs=1e-6)


def test_similarity_by_hand(pair, tmp_path, capsys):
    [(layer, cosines)] = similarity(list(map(read, pair))).items()
    assert layer == 1
    expected = 1 / 50**0.5
    torch.testing.assert_close(cosines, torch.tensor([[1, expected], [expected, 1]], dtype=torch.double))
    other = saved(tmp_path / "c", {1: [0.0, 1.0], 2: [1.0]})
    assert run("similarity", *pair, other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["a", "b", "c"] and list(found["cosines"]) == ["1"]
    assert found["cosines"]["1"][2] == pytest.approx([2 / 5**0.5, -1 / 10**0.5, 1])
    assert run("similarity", *pair) == 0
    assert f"| a | +1.000 | {expected:+.3f} | 2.236 |" in capsys.readouterr().out


def test_an_absent_layer_has_no_cosine(tmp_path):
    a, b, c = (
        read(saved(tmp_path / name, values))
        for name, values in (("a", {1: [1.0]}), ("b", {1: [1.0], 2: [1.0]}), ("c", {2: [1.0]}))
    )
    found = similarity([a, b, c])
    assert found[1][0].isnan().tolist() == [False, False, True] and found[2][0].isnan().all()


# -- folders --------------------------------------------------------------------------------------------------------


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_a_sum_loads_as_any_adapter_and_does_what_both_do_at_once(site, tmp_path, capsys):
    a, b = (saved(tmp_path / name, layers=[0, 2], site=site, seed=i) for i, name in enumerate("ab", 1))
    assert run("add", a, b, "--weights", 1, 0.5, "--output", tmp_path / "sum") == 0
    assert "1 × a + 0.5 × b" in capsys.readouterr().out
    made = PeftModel.from_pretrained(tiny(), str(tmp_path / "sum")).eval()
    both: Any = PeftModel.from_pretrained(tiny(), str(a))
    both.load_adapter(str(b), "second")
    both.base_model.set_adapter(["default", "second"])
    set_strength(both, 0.5, "second")
    torch.testing.assert_close(logits(made), logits(both.eval()))
    assert not torch.allclose(logits(made), logits(tiny()))
    # it can be exported, trained on and read again like any other
    assert read(tmp_path / "sum").layers == [0, 2]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["add", "A", "B"], [4, 1]),
        (["add", "A", "--weights", "-2"], [-2, -4]),
        (["subtract", "A", "B"], [-2, 3]),
        (["average", "A", "B"], [2, 0.5]),
        (["average", "A", "B", "--weights", "3", "1"], [1.5, 1.25]),
        (["project-out", "A", "B"], [0.7, 2.1]),
    ],
)
def test_every_operation_from_the_command_line(words, values, pair, tmp_path, capsys):
    places = dict(zip("AB", pair, strict=True))
    assert run(*(places.get(word, word) for word in words), "--output", tmp_path / "made", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"]["1"] == pytest.approx((values[0] ** 2 + values[1] ** 2) ** 0.5, rel=1e-5)
    assert first(read(tmp_path / "made")) == pytest.approx(values)


def test_orthogonalised_vectors_are_a_folder_each(pair, tmp_path):
    a, b = pair
    assert run("orthogonalise", b, a, "--output", tmp_path / "apart") == 0
    assert first(read(tmp_path / "apart" / "b")) == [3, -1]
    assert first(read(tmp_path / "apart" / "a")) == pytest.approx([0.7, 2.1])


def test_folders_of_one_name_are_told_apart_by_what_they_stand_in(tmp_path, capsys):
    a, b = (saved(tmp_path / name / "adapter", {1: [1.0]}, seed=1) for name in ("one", "two"))
    assert run("similarity", a, b, "--json") == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["one-adapter", "two-adapter"]


def test_the_card_says_what_it_was_made_of_and_that_nothing_was_measured(pair, tmp_path):
    assert run("subtract", *pair, "--output", tmp_path / "difference") == 0
    card = (tmp_path / "difference" / "README.md").read_text()
    assert "1 × a + -1 × b" in card and card.count("SHA-256") == 2
    assert read(pair[0]).sha256 in card
    assert "was not measured" in card and "Not measured." in card
    assert "`llama` of width 32 and 4 layers" in card
    assert "[More Information Needed]" not in card


def test_lengths_that_norm_prescribes_are_applied(tmp_path):
    fixed = read(saved(tmp_path / "fixed", {1: [3.0, 4.0]}, norm="fixed", norm_value=10.0, init="random"))
    assert first(fixed) == pytest.approx([6, 8]) and fixed.norm == "free"
    capped = read(saved(tmp_path / "capped", {1: [3.0, 4.0]}, norm="capped", norm_value=1.0))
    assert first(capped) == pytest.approx([0.6, 0.8])
    residual = {"1": 20.0}
    share: Any = dict(norm="relative", norm_value=0.5, init="random", residual_norms=residual)
    assert first(read(saved(tmp_path / "share", {1: [3.0, 4.0]}, **share))) == pytest.approx([6, 8])
    made = arithmetic.write(combine([fixed, capped], [1, 1], name="sum"), tmp_path / "sum", arithmetic.Card())
    assert first(read(made)) == pytest.approx([6.6, 8.8])


def test_tied_vectors_stand_at_all_their_layers(tmp_path):
    tied = saved(tmp_path / "tied", layers=[1, 3], tied=True)
    found = read(tied)
    assert found.layers == [1, 3] and torch.equal(found.vectors[1], found.vectors[3])
    arithmetic.write(combine([found], [2]), tmp_path / "twice", arithmetic.Card())
    twice = PeftModel.from_pretrained(tiny(), str(tmp_path / "twice")).eval()
    once = PeftModel.from_pretrained(tiny(), str(tied)).eval()
    with set_strength(once, 2.0):
        torch.testing.assert_close(logits(twice), logits(once))


def test_layers_that_only_some_have(tmp_path, capsys):
    a, b = saved(tmp_path / "a", {1: [1.0]}), saved(tmp_path / "b", {1: [2.0], 3: [5.0]})
    assert run("add", a, b, "--output", tmp_path / "sum") == 2
    said = capsys.readouterr().err
    assert "a [1], b [1, 3]" in said and "--missing zero" in said and "set_adapter" in said
    assert not (tmp_path / "sum").exists()
    assert run("add", a, b, "--output", tmp_path / "sum", "--missing", "zero") == 0
    found = read(tmp_path / "sum")
    assert first(found) == [3, 0] and first(found, 3) == [5, 0]
    assert first(project_out(read(b), [read(a)], "zero"), 3) == [5, 0]


# -- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "reason", "works"),
    [
        (dict(form="gated"), "form='gated': what it adds depends on the state", "set_adapter"),
        (dict(form="low_rank", rank=2), "form='low_rank'", "set_adapter"),
        (dict(site="mlp"), "site='block', other site='mlp'", "set_adapter"),
        (dict(positions="completion"), "positions='all', other positions='completion'", "set_adapter"),
        (dict(norm="preserve"), "norm='free', other norm='preserve'", "set_adapter"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']", "Train it without"),
    ],
)
def test_what_has_no_sum_is_refused_with_what_works(switches, reason, works, pair, tmp_path, capsys):
    other = saved(tmp_path / "other", **switches)
    assert run("add", pair[0], other, "--output", tmp_path / "sum") == 2
    said = capsys.readouterr().err
    assert reason in said and works in said
    assert not (tmp_path / "sum").exists()


def test_another_base_is_refused(pair, tmp_path, capsys):
    other = saved(tmp_path / "other", {1: [1.0]}, base=tiny(seed=7))
    for name in ("add", "similarity"):
        assert run(name, pair[0], other, *(["--output", tmp_path / "sum"] if name == "add" else [])) == 2
        assert "other was made for another base model than a: its embeddings differ" in capsys.readouterr().err
    wide = saved(tmp_path / "wide", {1: [1.0]}, base=tiny(num_hidden_layers=5))
    assert run("subtract", pair[0], wide, "--output", tmp_path / "sum") == 2
    assert "num_layers is 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["subtract", "A", "--output", "NEW"], "two folders or more"),
        (["add", "A", "B", "--weights", "1", "--output", "NEW"], "2 vectors need 2 finite weights"),
        (["add", "A", "B", "--weights", "1", "nan", "--output", "NEW"], "2 vectors need 2 finite weights"),
        (["average", "A", "B", "--weights", "1", "-1", "--output", "NEW"], "add up to 0"),
        (["subtract", "A", "A2", "--output", "NEW"], "zero or not finite"),
        (["project-out", "A", "A2", "--output", "NEW"], "Nothing of"),
        (["orthogonalise", "A", "A2", "--output", "NEW"], "Nothing of"),
        (["add", "A", "EMPTY", "--output", "NEW"], "is not an adapter folder"),
        (["add", "A", "B", "--output", "B"], "is not empty"),
        (["similarity", "A"], "two folders or more"),
        (["together", "A", "--data", "x", "y"], "two folders"),
    ],
)
def test_bad_input(words, reason, pair, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "a2", {1: [1.0, 2.0]})
    places = {"A": pair[0], "B": pair[1], "A2": tmp_path / "a2", "EMPTY": tmp_path / "empty", "NEW": tmp_path / "new"}
    assert run(*(places.get(word, word) for word in words)) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


def test_no_shared_layer_has_no_similarity(tmp_path):
    with pytest.raises(VectorError, match=r"They share no layer: a \[1\], b \[2\]"):
        similarity([read(saved(tmp_path / "a", {1: [1.0]})), read(saved(tmp_path / "b", {2: [1.0]}))])


# -- together -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A model with a tokenizer, two data sets, and two adapters."""
    home = tmp_path_factory.mktemp("together")
    tiny_data.save_model(home / "model", max_position_embeddings=512)
    for i, name in enumerate(("one", "two")):
        tiny_data.save_task(home / name, test=tiny_data.pairs(12, i))
        saved(home / f"v{name}", base=tiny(max_position_embeddings=512), layers=[1 + i], seed=i + 1)
    return home


def test_together_is_measured_on_the_data_of_both(task, capsys):
    words = ["together", task / "vone", task / "vtwo", "--data", task / "one", task / "two", "--rows", "12",
             "--model", task / "model", "--threads", "1"]  # fmt: skip
    assert run(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["vone", "vtwo"] and found["data"] == ["one", "two"]
    records = {(one["task"], one["arm"]): Record.from_json(one, Path()) for one in found["records"]}
    assert list(records) == [(name, arm) for arm in ("vone", "vtwo", "both") for name in ("one", "two")]
    for name in ("one", "two"):
        some = [records[name, arm].seen(1) for arm in ("vone", "vtwo", "both")]
        assert len({tuple(seen["margin"]) for seen in (some[0].base, *some)}) == 4, "four different models"
    assert {record.value("kl") for record in records.values()} == {0}
    text = two_vectors.summarise(found)
    assert "On one, vone alone" in text and "|  | base | vone | vtwo | both |" in text
    # by hand: both is the model with both vectors
    model: Any = PeftModel.from_pretrained(tiny(max_position_embeddings=512), str(task / "vone"))
    model.load_adapter(str(task / "vtwo"), "second")
    model.base_model.set_adapter(["default", "second"])
    rows = held_out_rows(str(task / "two"), [])[0].select(range(12))
    expected = margins(model.eval(), tiny_data.tokenizer(), rows)
    assert records["two", "both"].seen(1)["margin"] == pytest.approx(expected, abs=1e-3)


def test_together_keeps_what_does_not_meet_and_loses_what_cancels(task, tmp_path, capsys):
    opposite = arithmetic.write(combine([read(task / "vone")], [-1]), tmp_path / "opposite", arithmetic.Card())
    words = [
        "--data",
        task / "one",
        task / "one",
        "--rows",
        "12",
        "--model",
        task / "model",
        "--threads",
        "1",
        "--json",
    ]
    assert run("together", task / "vone", opposite, *words) == 0
    found = json.loads(capsys.readouterr().out)
    [seen, _] = [Record.from_json(one, Path()).seen(1) for one in found["records"] if one["arm"] == "both"]
    assert seen["margin"] == pytest.approx(seen.base["margin"], abs=1e-3)
    still = arithmetic.write(combine([read(task / "vone")], [1e-6]), tmp_path / "still", arithmetic.Card())
    assert run("together", task / "vone", still, *words) == 0
    found = json.loads(capsys.readouterr().out)["on"][0]
    assert found["kept"] == pytest.approx(1, abs=1e-2)
    assert found["verdict"] == ("keeps" if found["works"] else found["verdict"])


def test_strengths_are_those_of_each(task, capsys):
    words = [task / "vone", task / "vtwo", "--data", task / "one", task / "two", "--rows", "12", "--model",
             task / "model", "--threads", "1", "--strengths", "0", "1", "--json"]  # fmt: skip
    assert run("together", *words) == 0
    records = [Record.from_json(one, Path()) for one in json.loads(capsys.readouterr().out)["records"]]
    first, second, both = (record.seen(1) for record in records if record.keys["task"] == "one")
    assert first["margin"] == pytest.approx(first.base["margin"], abs=1e-3)
    assert both["margin"] == pytest.approx(second["margin"], abs=1e-3)


def test_verdicts_by_hand():
    noise = np.linspace(-0.1, 0.1, 40)

    def on(own: Any, other: Any, both: Any) -> dict[str, Any]:
        return two_vectors._compared(*(gains(values + np.zeros(40)) for values in (own, other, both)))

    keeps = on(2 + noise, 0, 1.9 + noise)
    assert keeps["verdict"] == "keeps" and keeps["kept"] == pytest.approx(0.95) and keeps["works"]
    loses = on(2 + noise, 0, 1.0 + noise)
    assert loses["verdict"] == "loses" and loses["kept"] == pytest.approx(0.5)
    assert loses["interaction"].startswith("-1.000")
    assert not on(30 * noise, 0, 0)["works"]


def gains(margins: Any) -> Record:
    """A record of a model with these margins, on pairs on which the base model has none."""
    observed = {"0": np.zeros(40), "1": margins}
    logps = {at: {"chosen_logp": values.tolist(), "rejected_logp": [0.0] * 40} for at, values in observed.items()}
    return Record({"arm": "a", "task": "t", "examples": 0, "seed": 0}, logps)


def test_together_refuses_another_base(task, tmp_path, capsys):
    other = saved(tmp_path / "other", base=tiny(seed=5, max_position_embeddings=512))
    words = ["--data", task / "one", task / "two", "--rows", "12", "--model", task / "model", "--threads", "1"]
    assert run("together", task / "vone", other, *words) == 2
    assert "cannot be loaded beside" in capsys.readouterr().err
    assert run("together", task / "vone", task / "vtwo", *words[:4], "99", *words[5:]) == 2
    assert "must be 2 to 12, the test pairs of" in capsys.readouterr().err


def test_functions_take_what_peft_made(tmp_path):
    model = steered(layers=[1], site="attention")
    model.save_pretrained(tmp_path / "a")
    assert read(tmp_path / "a").modules == {1: "model.layers.1.self_attn"}
