"""More examples of few: what augmenters make, what is left out, what is refused."""

from __future__ import annotations

import pytest
import tiny_data
from datasets import Dataset
from tiny_grids import make_tables, run
from tiny_models import tiny

from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.lab.arm import load_arm, make_arm
from steertune.recipes.lab.augmentation import AugmentationError, get_augmenter, grown, names, read
from steertune.recipes.lab.augmentation import function as function_module
from steertune.recipes.lab.augmentation.perturbations import Perturbations
from steertune.recipes.lab.augmentation.rewrites import Rewrites, sentence_of
from steertune.recipes.lab.augmentation.templates import Templates
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients.augmentation import Augmentation

PROMPTS = ["Should we record an album?", "What is a good first motorcycle?", "Can I eat it after a week?"]


def rows(chat=False):
    def say(role, text):
        return [{"role": role, "content": text}] if chat else text

    return Dataset.from_list(
        [
            {
                "prompt": say("user", prompt),
                "chosen": say("assistant", f"Careful {i}."),
                "rejected": say("assistant", f"Go {i}!"),
            }
            for i, prompt in enumerate(PROMPTS)
        ]
    )


def text(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ["templates", "perturbations"])
def test_versions_are_new_prompts_with_the_same_answers(name, chat):
    given = rows(chat)
    found = grown(given, get_augmenter(name), 4, seed=1)
    assert found.rows[:3] == given[:], "the examples themselves come first"
    assert len(found.rows) == 12 and "3 examples became 12" in found.note
    for k, row in enumerate(found.rows):
        own = given[k % 3]
        assert (row["chosen"], row["rejected"]) == (own["chosen"], own["rejected"])
    assert len({text(row["prompt"]) for row in found.rows}) == 12, "no version twice"
    assert found.rows[:] == grown(given, get_augmenter(name), 4, seed=1).rows[:], "drawn by the seed"
    assert found.rows[:] != grown(given, get_augmenter(name), 4, seed=2).rows[:]


def test_templates_hold_the_whole_prompt():
    for row in grown(rows(), Templates(), 16).rows:
        assert any(prompt in row["prompt"] for prompt in PROMPTS)


def test_perturbations_touch_the_inside_of_words_only():
    found = grown(rows(), Perturbations(rate=0.1), 6).rows
    for k, row in enumerate(found):
        own = PROMPTS[k % 3]
        assert [w[0].lower() for w in row["prompt"].split()] == [w[0].lower() for w in own.split()]
        assert abs(len(row["prompt"]) - len(own)) <= 0.15 * len(own) + 1


def test_one_time_is_nothing_new():
    assert grown(rows(), Templates(), 1).rows[:] == rows()[:]
    assert (
        read({}) is None
        and make_arm({"name": "a", "data": {"name": "warm_tone"}}).get(Augmentation).augmenter() is None
    )


def shout(row, random):
    return {**row, "prompt": row["prompt"].upper() + "!" * random.randint(1, 10**6).bit_length()}


def copies(row, random):
    return {**row, "prompt": row["prompt"].swapcase() + " "}


def leaks(row, random):
    return {**row, "prompt": "Is this a test row about whales and ships?"}


def breaks(row, random):
    return {"prompt": row["prompt"] + "!"}


def retypes(row, random):
    return {**row, "prompt": [{"role": "user", "content": "Hm?"}]}


def nothing(row, random):
    return None


def test_a_function_may_change_its_row_in_place():
    def louder(row, random):
        row["prompt"][-1]["content"] += "!" * random.randint(1, 10**6)
        return row

    talk = [{"prompt": [{"role": "user", "content": prompt}], "chosen": "a", "rejected": "b"} for prompt in PROMPTS]
    found = grown(Dataset.from_list(talk), get_augmenter("function", function=louder), 3).rows
    said = [row["prompt"][0]["content"] for row in found]
    assert said[:3] == PROMPTS[:3] and len({*said}) == 9, "the rows themselves stay as they are"


def test_a_function_of_the_user_s(monkeypatch):
    found = grown(rows(), get_augmenter("function", function=shout), 3)
    assert len(found.rows) == 9 and all(
        row["prompt"].startswith(PROMPTS[k].upper()) for k, row in enumerate(found.rows.select(range(3, 6)))
    )
    monkeypatch.setattr(function_module, "shout", shout, raising=False)
    named = get_augmenter("function", function="steertune.recipes.lab.augmentation.function:shout")
    assert grown(rows(), named, 3).rows[:] == found.rows[:]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (copies, "made 0 of 2 versions of 'Should we record an album\\?'.*copies"),
        (nothing, "that fail its checks"),
        (breaks, "not a row with keys \\['chosen', 'prompt', 'rejected'\\]"),
        (retypes, "'prompt' is a list in a new version, but was a str"),
    ],
)
def test_augmenters_that_return_nothing_new_are_refused(function, said):
    with pytest.raises(AugmentationError, match=said):
        grown(rows(), get_augmenter("function", function=function), 3)


def test_versions_near_test_text_are_left_out():
    test = Dataset.from_list(
        [{"prompt": "Is this a test row about whales and ships?", "chosen": "Yes.", "rejected": "No."}]
    )
    with pytest.raises(AugmentationError, match="close to rows of the evaluation"):
        grown(rows(), get_augmenter("function", function=leaks), 2, apart=[test])
    assert len(grown(rows(), get_augmenter("function", function=leaks), 2).rows) == 6, "not without them"


def test_a_prompt_that_all_data_share_is_no_leak():
    shared = rows().map(lambda row: {"prompt": "Say something kind about the weather."})
    test = Dataset.from_list(
        [{"prompt": "Say something kind about the weather.", "chosen": "Sun.", "rejected": "Rain."}]
    )
    assert len(grown(shared, Perturbations(), 2, apart=[test]).rows) == 6


@pytest.mark.parametrize(
    ("new", "passes"),
    [
        ("Is it wise that we record an album?", True),
        ("Should we?", False),  # too short
        ("Should we record an album? " * 3, False),  # too long
        ("Should we record an album.", False),  # asks no more
        ("Is it wise to eat the salad now?", False),  # about something else
    ],
)
def test_checks_of_a_paraphrase(new, passes):
    assert Rewrites().passes("Should we record an album?", new.strip()) == passes


def test_a_paraphrase_is_taken_out_of_its_packing():
    assert sentence_of('Sure, here you go: "Shall we?"\nIt keeps the meaning.') == "Shall we?"


def test_rewrites_ask_the_model_and_count_what_fails():
    tokenizer = tiny_data.tokenizer()
    model = tiny("llama").eval()
    given = rows(chat=True)
    before = [p.clone() for p in model.parameters()]
    loose = Rewrites(overlap=0.0, shortest=0.0, longest=50.0)
    for augmenter in (loose, Rewrites()):
        versions = augmenter(given.to_list(), 0, 3, model, tokenizer)
        assert versions == augmenter(given.to_list(), 0, 3, model, tokenizer), "the same random numbers again"
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(AugmentationError, match="Lower augmentation.times, or loosen"):
        grown(given, Rewrites(), 3, model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="give model and tokenizer"):
        Rewrites()(given.to_list(), 0, 0, None, None)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"times": 4}, "has no name"),
        ({"name": "template"}, "Did you mean 'templates'"),
        ({"name": "templates", "times": 0}, "times=0"),
        ({"name": "templates", "times": True}, "times=True"),
        ({"name": "templates", "templates": ["no place"]}, "where the prompt goes"),
        ({"name": "perturbations", "rate": 0.5}, "rate=0.5"),
        ({"name": "perturbations", "rat": 0.1}, "Did you mean 'rate'"),
        ({"name": "rewrites", "parts": ["answer"]}, "one or more of"),
        ({"name": "rewrites", "temperature": 0.0}, "above 0"),
        ({"name": "function", "function": "nowhere"}, "write module:name"),
        ({"name": "function", "function": "nowhere.at.all:f"}, "No module named"),
        ({"name": "function"}, "function"),
    ],
)
def test_bad_tables(table, said):
    with pytest.raises(ArmError, match=said):
        make_arm({"name": "a", "data": {"name": "warm_tone"}, "augmentation": table})


@pytest.mark.parametrize(("times", "steps", "fits"), [(4, None, False), (4, "x", False), (1, -1, True), (4, 0, True)])
def test_the_budget_stays_only_with_a_number_of_steps(times, steps, fits):
    tables = {"name": "a", "data": {"name": "warm_tone"}, "augmentation": {"name": "templates", "times": times}}
    tables["trainer"] = {} if steps is None else {"max_steps": steps}
    if fits:
        assert make_arm(tables).get(Augmentation).augmenter() is not None
        return
    said = (
        "max_steps='x': Input should be" if steps == "x" else "makes 4 times as many examples, and .*=-1.*Set trainer"
    )
    with pytest.raises(ArmError, match=said):
        make_arm(tables)


def test_data_without_prompts_are_refused():
    with pytest.raises(AugmentationError, match="made from prompts"):
        grown(rows().remove_columns("prompt"), Templates(), 2)


def test_every_augmenter_with_options_of_its_own_is_an_arm_s():
    assert names() == ["function", "perturbations", "rewrites", "templates"]
    for name in ("templates", "perturbations", "rewrites"):
        augmenter, times = load_arm(f"lora_{name}_dpo").get(Augmentation).augmenter() or (None, 0)
        assert type(augmenter).__name__.lower() == name and times > 1


def test_a_grid_crosses_it_at_the_same_budget(tmp_path):
    tables = make_tables(tmp_path)
    tables["factors"] = {
        "form": {"lora": tables["factors"]["form"]["lora"], "bias": {}},
        "data": {"x1": {}, "x4": {"augmentation": {"name": "perturbations", "times": 4}}},
    }
    tables |= {"arms": ["base"], "seeds": [0]}
    tables["design"] |= {"start": {"form": "lora", "data": "x1"}, "end": {"form": "bias", "data": "x4"}}
    tables["claim"] = {"better": "form=bias,data=x4", "than": "form=lora,data=x1"}
    cells = {cell["arm"]: cell for cell in run(tables, tmp_path / "run")}
    for form in ("lora", "bias"):
        once, four = (cells[f"form={form},data={data}"] for data in ("x1", "x4"))
        assert (once["steps"], once["pairs_read"]) == (four["steps"], four["pairs_read"])
        assert four["notes"]["augmentation"].startswith("4 examples became 16") and not once["notes"]
        assert once["margins"] != four["margins"]
    keys = {cell.arm.name: cell.key for cell in make_grid(tables).cells()}
    tables["factors"]["data"]["x4"]["augmentation"]["times"] = 3
    changed = {cell.arm.name: cell.key for cell in make_grid(tables).cells()}
    assert {name for name in keys if keys[name] != changed[name]} == {"form=lora,data=x4", "form=bias,data=x4"}


def test_a_grid_s_budget_is_the_number_of_steps_of_an_arm_that_says_none(tmp_path):
    tables = make_tables(tmp_path)
    kept = make_grid(tables).cells()[0].key
    base = tmp_path / "base.toml"
    base.write_text('extends = "lora_templates_dpo"\ntrainer.max_steps = {}\n')
    with pytest.raises(ArmError, match="Set trainer.max_steps"):
        load_arm(str(base))
    made = make_grid({**tables, "arms": [str(base)]})
    (own,) = (arm for arm in made.arms if arm.name == "base")
    assert own.arm.trainer["max_steps"] == made.tables.budget.steps[0] and own.arm.get(Augmentation).augmenter()
    assert make_grid(tables).cells()[0].key == kept
