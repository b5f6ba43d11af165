"""The sweep over layers and strengths: its choice by hand, its slopes, and the recipe itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_data
import torch
from measuring import margins
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import steered, tiny, tokens

from steertune.adapters import set_strength
from steertune.adapters.description import read_description
from steertune.recipes import sweep
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.rows import Record
from steertune.recipes.sweeping import choose as choosing
from steertune.recipes.sweeping import settings
from steertune.recipes.sweeping.choose import Setting, choose, reliability
from steertune.recipes.sweeping.settings import Limits
from steertune.recipes.sweeping.sources import Source, bake
from steertune.trainers import NonFiniteError, scaled


def place(layer: int, strengths: dict[float, dict], base: dict | None = None, site: str = "block") -> Record:
    """A place with what was observed at some strengths."""
    observed = {f"{strength:g}": values for strength, values in {0.0: base or observe(0, kl=0.0), **strengths}.items()}
    keys = {"arm": f"a/{site}-{layer}", "task": "t", "examples": 8, "seed": 0}
    return Record(keys, observed, {"site": site, "layer": layer, "status": "ok"})


def observe(right: int, kl: float = 0.1, perplexity: float = 6.0, **more) -> dict:
    """What is seen of a model that gets the first `right` of ten pairs right; neutral text has ten tokens."""
    neutral = {"neutral_kl": [10 * kl], "neutral_nll": [10 * math.log(perplexity)], "neutral_tokens": [10]}
    chosen = [1.0] * right + [-1.0] * (10 - right)
    answers = {"neutral_answer": ["a b c d a b c"]}  # one word triple of five occurs twice
    return {"chosen_logp": chosen, "rejected_logp": [0.0] * 10, **neutral, **answers, **more}


def setting(layer: int, strength: float, right: int, base: dict | None = None, **more) -> Setting:
    return Setting(place(layer, {strength: observe(right, **more)}, base), strength)


# -- the choice, by hand ---------------------------------------------------------------------------------------------


def test_the_gentlest_within_one_standard_error_of_the_best():
    # 9 and 8 right differ in one pair of ten: mean 0.1, standard error of ten such differences 0.1
    some = [setting(1, 1, 3, kl=0.01), setting(1, 2, 8, kl=0.05), setting(2, 2, 9, kl=0.2), setting(2, 4, 10, kl=2.0)]
    found = choose(some, Limits())
    assert found.setting is some[1]
    assert "layer 1 at strength 2 (0.800) has the least KL" in found.reason
    assert "3 of 4 settings leave neutral text within the limits" in found.reason
    assert "layer 2 at strength 2 has the best pair accuracy on validation rows (0.900)" in found.reason


def test_one_that_stands_alone():
    some = [setting(1, 1, 3, kl=0.01), setting(2, 2, 9)]
    found = choose(some, Limits())
    assert found.setting is some[1] and "no other is both within one standard error" in found.reason


def test_what_is_not_ahead_of_the_base_is_not_chosen_for_being_gentle():
    # one right is one error from the base's none, and one error from the best's two
    some = [setting(1, 0.5, 1, kl=0.01), setting(1, 1, 2, kl=0.1)]
    assert choose(some, Limits()).setting is some[1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(kl=0.31), "KL 0.31"),
        (dict(perplexity=7.6), "perplexity × 1.3"),
        (dict(neutral_answer=["a b c a b c a b c"]), "repetition 57%"),
        (dict(kl=float("nan")), "not finite"),
    ],
)
def test_what_harms_neutral_text_is_not_recommended(change, why):
    harmful = setting(1, 2, 9, **change)
    assert why in choosing.excesses(harmful, Limits())[0]
    assert choose([harmful], Limits()).setting is None
    gentle = setting(2, 1, 6)
    assert choose([harmful, gentle], Limits()).setting is gentle


def test_no_gain_is_no_recommendation():
    # one pair of ten is within one standard error of nothing
    found = choose([setting(1, 1, 1)], Limits())
    assert found.setting is None and "within one standard error of the base model" in found.reason
    assert choose([], Limits()).setting is None
    assert choose([setting(1, -1, 9)], Limits()).setting is None, "negative strengths are the opposite"


def test_with_a_scorer_the_generated_answers_decide():
    base = observe(0, kl=0.0, score=[0.1] * 4)
    some = [setting(1, 1, 9, base, score=[0.1] * 4), setting(2, 1, 2, base, score=[0.8, 0.9, 0.8, 0.9])]
    found = choose(some, Limits())
    assert found.setting is some[1] and "behaviour score" in found.reason
    some[0] = setting(1, 1, 9, base, score=[0.1, None, 0.1, 0.1])  # a judgement that failed: pairs decide
    assert choose(some, Limits()).setting is some[0]


def test_slopes_by_hand():
    margins = {1.0: [1.0, 0.0, -2.0, 0.5], 2.0: [2.0, -1.0, -4.0, 1.0], 4.0: [9.0, 9.0, 9.0, 9.0], -1.0: [5.0] * 4}

    def slopes(base: list[float], strength: float):
        record = place(1, {s: margins_of(m) for s, m in margins.items()}, margins_of(base))
        return reliability(Setting(record, strength))

    found = slopes([0.0] * 4, 2.0)
    # lines through strengths 0, 1, 2: the second goes 0, 0, -1
    assert found.slopes == pytest.approx([1, -0.5, -2, 0.5])
    assert (found.wrong, found.share, found.unreliable) == (2, 0.5, True)
    assert found.low == pytest.approx(0.15, abs=0.01) and found.high == pytest.approx(0.85, abs=0.01)
    opposite = slopes([6.0, 4.0, 4.0, 4.0], -1.0)
    assert opposite.slopes == pytest.approx([1, -1, -1, -1]), "nats per unit of strength, also below 0"


def margins_of(margins: list[float]) -> dict:
    return {"chosen_logp": margins, "rejected_logp": [0.0] * len(margins)}


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches",
    [
        {},
        dict(form="gated"),
        dict(form="low_rank", rank=2),
        dict(norm="fixed", norm_value=2.0, init="random"),
        dict(norm="capped", norm_value=1.0),
        dict(norm="preserve"),
        dict(tied=True, layers=[0, 2]),
        dict(norm="relative", norm_value=0.5, init="random", residual_norms={"1": 3.0}),
    ],
)
@pytest.mark.parametrize("strength", [3.0, -2.0])
def test_a_baked_strength_is_that_strength(switches, strength, tmp_path):
    model = steered(**{"layers": 1, **switches})
    with torch.no_grad(), set_strength(model, strength):
        expected = model(tokens()).logits
    bake(model, strength)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        found = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()(tokens()).logits
    torch.testing.assert_close(found, expected)


def test_a_baked_strength_of_a_lora(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny(), config).eval()
    with torch.no_grad(), scaled(model, 3.0):
        expected = model(tokens()).logits
    bake(model, 3.0)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        found = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()(tokens()).logits
    torch.testing.assert_close(found, expected)


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny model, a task that it has a chance at (it prefers `dog`), and an arm."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_data.save_model(folder / "model", max_position_embeddings=512)
    task = tiny_data.save_task(folder / "task", **tiny_data.cats_and_dogs())
    (folder / "arm.toml").write_text(
        f'[data]\nname = "{task}"\n[adapter]\ntype = "steering_vector"\n[loss]\nname = "dpo"\n'
        "[trainer]\nmax_steps = 8\nper_device_train_batch_size = 4\nlearning_rate = 0.5\n"
    )
    return folder


def words(home: Path, folder: Path, *more: object) -> list[str]:
    given = [home / "task", "--model", home / "model", "--train", 8, "--validation", 8, "--test", 8, "--threads", 1,
             "--new-tokens", 4, "--generations", 2, "--folder", folder, *more]  # fmt: skip
    return [str(word) for word in given]


@pytest.fixture(scope="module")
def swept(home, tmp_path_factory) -> Path:
    """A finished sweep of what was trained at two layers."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    limits = ["--max-kl", 9, "--max-perplexity", 99, "--max-repetition", 1]
    more = ["--layers", 1, 0.75, "--strengths", 1, 3, "--arm", home / "arm.toml", *limits]
    assert sweep.main(words(home, folder, *more)) == 0
    return folder


def read(run: Path) -> tuple[dict, list[Record], Record | None]:
    """The result of a sweep, its records, and the one of test rows."""
    file = run / "result.json"
    result = json.loads(file.read_text())
    records = [Record.from_json(record, file) for record in result["records"]]
    return result, records, result["test"] and Record.from_json(result["test"], file)


def test_every_setting_is_measured_as_it_is_by_hand(swept, home):
    result, records, _ = read(swept)
    some = choosing.settings_of(records)
    assert [(one.layer, one.strength) for one in some] == [(1, 1), (1, 3), (3, 1), (3, 3)]
    model, tokenizer = tiny(max_position_embeddings=512), tiny_data.tokenizer()
    rows = sweep.Context(sweep.SweepTable(**result["settings"])).rows("validation")
    plain = margins(model, tokenizer, rows)
    assert some[0].base.rows("margin").tolist() == pytest.approx(plain.tolist(), abs=1e-3)
    for one in some:
        adapter = swept / "cells" / f"block-{one.layer}" / "adapter"
        made = PeftModel.from_pretrained(tiny(max_position_embeddings=512), str(adapter)).eval()
        found = margins(made, tokenizer, rows, one.strength)
        assert one.rows("margin").tolist() == pytest.approx(found.tolist(), abs=1e-3)
        assert one.value("kl") > 0 and one.value("margin_gain") == pytest.approx((found - plain).mean(), abs=1e-3)


def test_the_recommended_adapter_is_the_setting_with_its_strength_baked_in(swept):
    result, _, test = read(swept)
    where = result["recommended"]
    assert where is not None and test is not None and test.value("margin_gain", where["strength"]) > 0
    place = swept / "cells" / f"block-{where['layer']}" / "adapter"
    one, other = (
        PeftModel.from_pretrained(tiny(max_position_embeddings=512), str(folder)).eval()
        for folder in (swept / "adapter", place)
    )
    with torch.no_grad(), set_strength(other, where["strength"]):
        torch.testing.assert_close(one(tokens()).logits, other(tokens()).logits)


def test_the_page_the_pictures_and_the_card(swept):
    page = (swept / "page.md").read_text()
    for text in ("## Recommended: layer", "charts/heat.png", "charts/pareto.png", "charts/slopes.png", "read once",
                 "## Every setting", "| base | 0 |", "--folder FOLDER"):  # fmt: skip
        assert text in page, text
    assert (swept / "page.html").read_text().count("data:image/png;base64") == 4
    card = (swept / "adapter" / "README.md").read_text()
    for text in (
        "## Safety",
        "of the sweep, baked in",
        "| held-out pair accuracy |",
        "KL to the base model",
        "8 training pairs",
    ):
        assert text in card, text
    assert "[More Information Needed]" not in card
    values = read_description(swept / "adapter")
    assert values is not None and values["data"]["examples"] == 8
    assert values["strength"]["recommended"] == 1 and values["strength"]["measured"]["1"]["kl"] > 0


def test_a_finished_sweep_is_not_overwritten(swept, home, capsys):
    assert sweep.main(words(home, swept, "--layers", 1, "--strengths", 4)) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_an_interrupted_sweep_goes_on(home, tmp_path, monkeypatch):
    asked = words(home, tmp_path / "run", "--layers", 1, 3, "--strengths", 4, 64)
    measured, plain = [], sweep.evaluate

    def stops(model, held_out, strengths):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.extend(strengths)
        return plain(model, held_out, strengths=strengths)

    monkeypatch.setattr(sweep, "evaluate", stops)
    assert sweep.main(asked) == 130
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")}
    monkeypatch.setattr(
        sweep, "evaluate", lambda *given, strengths: measured.extend(strengths) or plain(*given, strengths=strengths)
    )
    fitted = []
    monkeypatch.setattr(Source, "_fit_directions", lambda self, site: fitted.append(site))
    assert sweep.main(asked) == 0
    # a recommended setting is measured once more, on test rows
    assert measured[:4] == [4, 64, 4, 64] and len(measured) <= 5 and not fitted, "nothing is measured or made twice"
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run" / "cells").rglob("*.safetensors")} == kept


def test_arms_are_changed_on_the_command_line_and_a_run_says_how_it_was_trained(home, tmp_path):
    arm = settings.read_arm(str(home / "arm.toml"), ["--loss.beta", "0.2"])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.json").write_text(arm.model_dump_json())
    for folder in (tmp_path, tmp_path / "adapter"):
        assert settings.read_arm(str(folder), []).loss == {"name": "dpo", "beta": 0.2}
    with pytest.raises(ArmError, match="used as it was trained"):
        settings.read_arm(str(tmp_path), ["--loss.beta", "0.1"])
    assert settings.at(arm, "mlp", 2).adapter == {"type": "steering_vector", "layers": 2, "site": "mlp"}
    lora = settings.read_arm("lora_dpo", [])
    assert settings.at(lora, "block", 2).adapter["layers_to_transform"] == [2]


def test_a_training_that_diverges_is_a_result(home, tmp_path, monkeypatch):
    def diverges(self, site, layer, folder):
        raise NonFiniteError("The loss is not finite.")

    monkeypatch.setattr(Source, "model", diverges)
    assert sweep.main(words(home, tmp_path / "run", "--layers", 1, "--strengths", 1, 2)) == 0
    page = (tmp_path / "run" / "page.md").read_text()
    assert page.count("The loss is not finite.") == 2 and "leave the model as it is" in page


def test_sites_and_a_scorer(home, tmp_path):
    scorer = '{kind = "rule", pattern = "stay"}'
    more = ["--layers", 2, "--strengths", 16, "--sites", "block", "mlp", "--scorer", scorer, "--scorer-rows", 4]
    assert sweep.main(words(home, tmp_path / "run", *more)) == 0
    _, records, _ = read(tmp_path / "run")
    some = choosing.settings_of(records)
    assert [one.site for one in some] == ["block", "mlp"]
    assert all(len(one.rows("behaviour")) == 2 for one in some)
    assert "rule: the answer matches /stay/" in (tmp_path / "run" / "page.md").read_text()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--layers", "9"], "layer 9 does not exist, the model has 4"),
        (["--layers", "1.5"], "fractions of the depth are in [0, 1)"),
        (["--layers", "first"], "an index, a fraction of the depth"),
        (["--strengths", "0", "1"], "0 is the base model, which is always measured"),
        (["--strengths", "nan"], "finite number"),
        (["--direction", "mean_diference"], "Did you mean 'mean_difference'?"),
        (["--sites", "head"], "sites"),
        (["--arm", "full_dpo"], "has no strength to sweep"),
        (["--arm", "no_such_arm"], "No arm"),
        (["--arm", "lora_dpo", "--sites", "mlp"], "a LoRA changes the matrices"),
        (["--loss.beta", "1"], "only allowed with --arm"),
        (["--scorer", "rulle"], "scorer.kind='rulle'"),
        (["--scorer", "{kind = "], "is not a TOML table"),
        (["--scorer", '{kind = "rule", pattern = "x"}', "--generations", "0"], "--generations must be 1 or more"),
        (["--train", "99"], "Ask for fewer"),
        (["--max-kl", "0"], "kl"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(more, reason, home, tmp_path, capsys):
    assert sweep.main(words(home, tmp_path / "run", *more)) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_without_pairs_are_refused(home, tmp_path, capsys):
    task = tiny_data.save_task(tmp_path, train=tiny_data.demonstrations(), test=tiny_data.demonstrations())
    assert sweep.main([task, *words(home, tmp_path / "run")[1:]]) == 2
    assert "['prompt', 'completion']" in capsys.readouterr().err


def test_a_folder_that_does_not_say_how_it_was_trained(tmp_path):
    steered(layers=1).save_pretrained(tmp_path)
    with pytest.raises(ArmError, match="does not say how it was trained"):
        settings.read_arm(str(tmp_path), [])


def test_a_damaged_setting_is_named(home, tmp_path, capsys):
    file = tmp_path / "run" / "cells" / "block-1" / "record.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert sweep.main(words(home, tmp_path / "run", "--layers", 1, "--strengths", 4)) == 2
    assert "block-1/record.json is damaged" in capsys.readouterr().err
