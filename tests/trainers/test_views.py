"""Views: the same answers behind other prompts, and losses that compare the model with itself through them."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from tiny_data import TEMPLATE, conversational, demonstrations, losses, pairs, tokenizer, trained, trainer, values
from tiny_models import tiny
from tiny_views import states_of

from steertune.adapters import SteeringVectorConfig
from steertune.losses import Loss, Outputs, Staged, get_loss
from steertune.trainers import Batch, FrozenPrefix, View, ViewError, collator, get_view, tokenise, train_together
from steertune.trainers.model_at import ModelAt
from steertune.trainers.views import Views, names

GOOD, BAD = get_view("instruction", text="now we stay"), get_view("instruction", text="then you go")
BOTH = {"good": GOOD, "bad": BAD}


def seen_by(loss: str | Loss, **others: View) -> dict[str, View]:
    """The views that a loss asks for."""
    return {name: {**BOTH, **others}[name] for name in get_loss(loss).needs.views}


# -- what a view makes of a row --------------------------------------------------------------------------------------


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("where", "prompt", "expected"),
    [
        ("before", "the cat ", "be kind\n\nthe cat "),
        ("after", "the cat ", "the cat\n\nbe kind "),
        ("before", chat(("user", "hi")), chat(("user", "be kind\n\nhi"))),
        ("after", chat(("system", "s"), ("user", "hi")), chat(("system", "s"), ("user", "hi\n\nbe kind"))),
        ("system", chat(("user", "hi")), chat(("system", "be kind"), ("user", "hi"))),
        ("system", chat(("system", "s"), ("user", "hi")), chat(("system", "be kind"), ("user", "hi"))),
    ],
)
def test_instruction(where, prompt, expected):
    view = get_view("instruction", text="be kind", where=where)
    row = {"prompt": prompt, "completion": "a dog"}
    assert view([row]) == [{"prompt": expected, "completion": "a dog"}]
    assert row["prompt"] == prompt, "the row itself is not changed"


ROWS = [{"prompt": f"q{i} ", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(4)]


def test_demonstrations_are_other_rows_with_their_answers():
    for i, row in enumerate(get_view("demonstrations", k=2)(ROWS)):
        *shown, own = row["prompt"].split("\n\n")
        assert own == f"q{i} " and len(shown) == 2 and f"q{i} good{i}" not in shown
        assert set(shown) < {f"q{j} good{j}" for j in range(4)}
        assert row["chosen"] == f"good{i}"


def test_where_all_ask_the_same_other_answers_are_demonstrations():
    rows = [{"prompt": "Say something: ", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    seen = [row["prompt"] for row in get_view("demonstrations", k=4, contrast=True)(rows)]
    for i, prompt in enumerate(seen):
        assert [f"good {j}" in prompt for j in range(5)] == [j != i for j in range(5)]
    with pytest.raises(ViewError, match="k=1 demonstrations need as many other examples .got 0"):
        get_view("demonstrations", k=1, pool=(rows[0],))([rows[1]])
    [asked] = get_view("demonstrations", k=5, pool=tuple(rows))([{"prompt": "Say something: "}])
    assert all(row["chosen"] in asked["prompt"] for row in rows), "a row without an answer is none of them"
    with pytest.raises(ViewError, match="k=2 demonstrations need as many other examples .got 1"):
        get_view("demonstrations", k=2)([*ROWS[:2], {**ROWS[0], "chosen": "another answer"}])


def test_demonstrations_of_a_conversation_are_turns():
    rows = [
        {"prompt": chat(("system", "s"), ("user", r["prompt"])), "chosen": chat(("assistant", r["chosen"]))}
        for r in ROWS
    ]
    [first, *_] = get_view("demonstrations", k=3, instruction="be kind")(rows)
    assert [m["role"] for m in first["prompt"]] == ["system", *["user", "assistant"] * 3, "user"]
    assert first["prompt"][0]["content"] == "be kind"
    assert first["prompt"][-1]["content"] == "q0 "


@pytest.mark.parametrize("as_chat", [False, True])
def test_contrast_prompts_show_a_bad_answer_beside_a_good_one(as_chat):
    rows = ROWS
    if as_chat:
        rows = [
            {"prompt": chat(("user", r["prompt"])), **{k: chat(("assistant", r[k])) for k in ("chosen", "rejected")}}
            for r in ROWS
        ]
    [first, *_] = get_view("demonstrations", k=1, contrast=True, seed=3)(rows)
    text = first["prompt"][0]["content"] if as_chat else first["prompt"]
    shown = next(i for i in range(1, 4) if f"q{i}" in text)
    expected = f"q{shown}\nGood response: good{shown}\nBad response: bad{shown}\n\nq0\nGood response: "
    assert text == expected
    assert first["chosen"] == rows[0]["chosen"]


def talks(*before: tuple[str, str]) -> list[dict]:
    """The rows as conversations, each with a system message of its own and turns before its question."""
    return [
        {
            "prompt": chat(("system", f"s{i}"), *before, ("user", f"q{i}")),
            **{side: chat(("assistant", row[side])) for side in ("chosen", "rejected")},
        }
        for i, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("contrast", [False, True])
def test_a_conversation_keeps_its_own_system_message_alone(contrast):
    for i, row in enumerate(get_view("demonstrations", k=2, contrast=contrast)(talks())):
        first, *rest = row["prompt"]
        assert first == {"role": "system", "content": f"s{i}"}
        assert [m["role"] for m in rest] == ["user"] if contrast else ["user", "assistant"] * 2 + ["user"]
        assert not any(f"s{j}" in m["content"] for m in rest for j in range(4)), "not those of other rows"
    for row in get_view("demonstrations", k=2, contrast=contrast, instruction="be kind")(talks()):
        first, *rest = row["prompt"]
        assert first["role"] == ("user" if contrast else "system") and first["content"].startswith("be kind")
        assert not any("s0" in m["content"] for m in row["prompt"])
        assert all(m["role"] != "system" for m in rest)


def test_contrast_prompts_say_who_says_what():
    pool = tuple(talks()[1:2])
    [first, *_] = get_view("demonstrations", k=1, contrast=True, pool=pool)(talks(("user", "a"), ("assistant", "r")))
    assert first["prompt"] == chat(
        ("system", "s0"),
        ("user", "q1\nGood response: good1\nBad response: bad1\n\nuser: a\nassistant: r\nuser: q0\nGood response:"),
    )


def test_a_given_pool_is_drawn_from_and_a_row_never_shows_itself():
    view = get_view("demonstrations", k=1, pool=(ROWS[0], ROWS[1]))
    assert view([ROWS[0]])[0]["prompt"].startswith("q1 good1")


BAD_ROWS = {
    "too few": (
        get_view("demonstrations", k=4),
        ROWS,
        "Row 0: k=4 demonstrations need.*got 3",
    ),
    "no rejected": (
        get_view("demonstrations", k=1, contrast=True),
        [{"prompt": f"q{i}", "completion": "a"} for i in range(2)],
        "the data have none",
    ),
    "no prompt": (GOOD, [{"text": "the cat"}], "Give a column 'prompt'"),
    "no system": (get_view("instruction", text="x", where="system"), ROWS, "where='system' needs conversations"),
    "no user": (GOOD, [{"prompt": chat(("assistant", "hi"))}], "must end with a user message"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_cannot_be_seen_this_way(case):
    view, rows, message = BAD_ROWS[case]
    with pytest.raises(ViewError, match=message):
        view(rows)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("instrution", {}, "Did you mean 'instruction'"),
        ("instruction", {"texts": "x"}, "Did you mean 'text'"),
        ("instruction", {"text": " "}, "text=' ' must not be empty"),
        ("instruction", {"text": "x", "where": "below"}, "must be 'before', 'after' or 'system'"),
        ("demonstrations", {"k": 0}, "k=0"),
        ("demonstrations", {"k": True}, "k=True"),
        ("neutral", {"rows": ()}, "must not be empty. Give neutral text"),
        (GOOD, {"text": "x"}, "not with an object"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_view(name, **options)


def test_names_are_the_files():
    assert names() == ["demonstrations", "instruction", "neutral", "teacher"]


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("data", [pairs(), demonstrations()])
def test_a_view_of_a_batch_has_its_answers_behind_the_other_prompts(data, chats):
    data = conversational(data) if chats else data
    words, tokenised = tokenizer(), tokenise(data, tokenizer())
    table = Views({"good": GOOD}, words)
    table.add(data, tokenised)
    batch = Batch.read(collator(tokenised, words)(tokenised.to_list()[2:5]))
    seen = table.of("good", batch)
    assert seen.pairs == batch.pairs
    first = words("now we stay", add_special_tokens=False)["input_ids"]
    for i, row in enumerate(seen.labels):
        assert row[row != -100].tolist() == batch.labels[i][batch.labels[i] != -100].tolist()
        ids = seen.inputs["input_ids"][i][seen.inputs["attention_mask"][i].bool()].tolist()
        start = 2 if chats else 0  # behind <s> and <user>
        assert ids[start : start + 3] == first
        own = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()].tolist()
        assert ids[start + 3 :] == own[start:]


def test_a_neutral_view_has_one_row_a_pair():
    data, words = pairs(), tokenizer()
    tokenised = tokenise(data, words)
    table = Views({"neutral": get_view("neutral", rows=demonstrations(3, seed=5).to_list())}, words)
    table.add(data, tokenised)
    seen = table.of("neutral", Batch.read(collator(tokenised, words)(tokenised.to_list()[:4])))
    assert len(seen.labels) == 4 and not seen.pairs
    assert seen.labels[0].tolist() == seen.labels[3].tolist(), "three neutral rows, over and over"


class Other(View):
    def __call__(self, rows):
        return [{**row, "completion": "sea"} for row in rows]


@pytest.mark.parametrize(
    ("view", "rows", "context", "message"),
    [
        (Other(), demonstrations(), None, "row 0: the answer has other tokens"),
        (get_view("demonstrations", k=5), demonstrations(), 16, "has [0-9]+ tokens, but the model reads only 16"),
    ],
)
def test_views_that_do_not_fit(view, rows, context, message):
    with pytest.raises(ViewError, match=message):
        Views({"good": view}, tokenizer(), context).add(rows, tokenise(rows, tokenizer()))


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("", "View 'good' shows every row unchanged.*a system message, say"),
        (
            "{{ raise_exception('System role not supported') }}",
            "refuses it .System role not supported.*where='before'",
        ),
    ],
)
def test_chat_templates_without_system_messages(system, message):
    template = TEMPLATE.replace("%}<{{", "%}{% if m.role == 'system' %}" + system + "{% else %}<{{")
    words = tokenizer(template=template.replace("</s>{% endfor", "</s>{% endif %}{% endfor"))
    rows = conversational(pairs())
    table = Views({"good": get_view("instruction", text="we stay", where="system")}, words)
    with pytest.raises(ViewError, match=message):
        table.add(rows, tokenise(rows, words))
    Views({"good": get_view("instruction", text="we stay")}, words).add(rows, tokenise(rows, words))


def test_demonstrations_of_evaluation_rows_are_training_rows(tmp_path):
    view, evaluation = get_view("demonstrations", k=2), pairs(3, seed=9)
    made = trainer("dpo", tmp_path, loss="prompted", views={"good": view}, eval_dataset=evaluation)
    [batch] = made.get_eval_dataloader()
    shown = tokenizer().batch_decode(made.views.of("good", Batch.read(batch)).inputs["input_ids"])
    starts = [row["prompt"].strip() for row in pairs().to_list()]
    assert all(sum(text.strip().startswith(start) for start in starts) for text in shown[:3])
    mixed = Dataset.from_list([*pairs().to_list(), *evaluation.to_list()[:1]])
    with pytest.raises(ViewError, match="1 of the 9 rows that demonstrations are drawn from are evaluation rows"):
        trainer("dpo", tmp_path, loss="prompted", views={"good": view}, data=mixed, eval_dataset=evaluation)
    pooled = get_view("demonstrations", k=2, pool=tuple(evaluation.to_list()))
    with pytest.raises(ViewError, match="3 of the 3 rows"):
        trainer("dpo", tmp_path, loss="prompted", views={"good": pooled}, eval_dataset=evaluation)


def test_what_is_cut_off_is_said(tmp_path, caplog):
    trainer("dpo", tmp_path, max_length=7)
    assert "pairs are longer than max_length=7 (the longest: 9 tokens): the end of their answers" in caplog.text
    caplog.clear()
    trainer("dpo", tmp_path, max_length=7, truncation_mode="keep_end")
    assert "the beginning of their prompts is dropped" in caplog.text
    caplog.clear()
    trainer("dpo", tmp_path, max_length=9)
    assert "dropped" not in caplog.text


def test_a_row_that_was_cut_has_no_view(tmp_path):
    made = trainer("dpo", tmp_path, loss="prompted", views={"good": GOOD}, max_length=6)
    with pytest.raises(ViewError, match="cut to max_length"):
        made.train()


def test_missing_views_are_refused_before_training(tmp_path):
    with pytest.raises(ViewError, match=r"LoRRA compares with the views \['good', 'bad'\]; \['bad'\] are not"):
        trainer("sft", tmp_path, loss="lorra", views={"good": GOOD})
    with pytest.raises(ViewError, match="'neutral'"):
        trainer("dpo", tmp_path, loss=get_loss("dpo", neutral_kl=0.1))


# -- losses by hand --------------------------------------------------------------------------------------------------


def hand(strength, view="", layers=(), distribution=False, site="block"):
    states = {(1.0, ""): [1.0, 2.0], (0.0, ""): [0.0, 0.0], (0.0, "good"): [1.0, 0.0], (0.0, "bad"): [0.0, 1.0]}
    chances = {(1.0, ""): [0.5, 0.5], (0.0, "good"): [0.25, 0.75], (1.0, "neutral"): [0.25, 0.75]}
    chances[0.0, "neutral"] = [0.5, 0.5]
    where = (float(strength), view)
    hidden = {3: torch.tensor([states[where]]), 5: torch.tensor([states[where]])} if layers else {}
    told = torch.tensor([chances[where]]).log() if distribution else None
    return Outputs(torch.tensor([[-1.0]]), torch.tensor([[True]]), hidden, told)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lorra", {"alpha": 2.0}, 17**0.5),  # (1, 2) - 2 ((1, 0) - (0, 1)) = (-1, 4)
        ("prompted", {}, 2.0),  # ((1 - 1)² + 2²) / 2
        ("context_distillation", {}, 0.1308120),  # 0.25 ln 0.5 + 0.75 ln 1.5
        ("cross_entropy", {"neutral_kl": 2.0}, 1 + 2 * 0.1308120),
        ("lorra", {"alpha": 2.0, "neutral_kl": 2.0}, 17**0.5 + 2 * 0.1308120),
    ],
)
def test_loss_by_hand(name, options, expected):
    assert float(get_loss(name, **options)(hand).sum()) == pytest.approx(expected, abs=1e-6)


def test_neutral_kl_is_added_to_every_pair():
    def at(strength, view="", layers=(), distribution=False):
        if view:
            return hand(strength, view, layers, distribution)
        return Outputs(torch.tensor([[-1.0], [-3.0]]) * (1 if strength else 2), torch.ones(2, 1).bool())

    plain, more = get_loss("dpo")(at), get_loss("dpo", neutral_kl=0.5)(at)
    assert (more - plain).tolist() == pytest.approx([0.5 * 0.1308120], abs=1e-6)


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1"])
def test_bad_neutral_kl(value):
    with pytest.raises(ValueError, match="neutral_kl"):
        get_loss("dpo", neutral_kl=value)


@pytest.mark.parametrize("name", ["lorra", "prompted"])
@pytest.mark.parametrize("layers", [-1, 1.0, True, "half", [0.5, -2]])
def test_layers_that_are_none(name, layers):
    with pytest.raises(ValueError, match=r"layers=.* must be an index from 0"):
        get_loss(name, layers=layers)


@pytest.mark.parametrize("name", ["lorra", "prompted"])
def test_no_layers(name):
    with pytest.raises(ValueError, match="needs at least one layer"):
        get_loss(name, layers=[])


# -- on a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["block", "attention"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_one_full_step_finds_the_vector_that_an_instruction_is(kind, site, tmp_path):
    data = demonstrations(6) if kind == "sft" else pairs(6)
    expected = (states_of(tiny(), data, GOOD, site=site) - states_of(tiny(), data, site=site)).mean(dim=0)
    loss = get_loss("prompted", layers=2, site=site)
    made = trained(
        kind, tmp_path, data=data, loss=loss, views={"good": GOOD}, max_steps=1,
        peft_config=SteeringVectorConfig(layers=2, site=site, stream_sizes={}), optim="sgd",
        learning_rate=16.0, lr_scheduler_type="constant", per_device_train_batch_size=6, max_grad_norm=0.0,
    )  # fmt: skip
    [vector] = values(made.model).values()
    torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)
    assert vector.norm() > 1e-3


@torch.no_grad()
def test_context_distillation_is_the_divergence_from_the_prompted_model(tmp_path):
    data = demonstrations(4)
    made = trainer("sft", tmp_path, data=data, loss="context_distillation", views={"good": GOOD})
    batch = Batch.read(next(iter(made.get_train_dataloader())))
    at = ModelAt(made.model, made.model, batch, views=made.views)
    value = get_loss("context_distillation")(at)
    model, expected = tiny(), []
    for ids, labels in zip(batch.inputs["input_ids"].tolist(), batch.labels.tolist(), strict=True):
        start, end = next(i for i, x in enumerate(labels) if x != -100), sum(x != 0 for x in ids)
        words = tokenizer()("now we stay", add_special_tokens=False)["input_ids"]
        plain = model(torch.tensor([ids[:end]])).logits[0, start - 1 : end - 1].log_softmax(-1)
        asked = model(torch.tensor([words + ids[:end]])).logits[0, start + 2 : end + 2].log_softmax(-1)
        expected.append((asked.exp() * (asked - plain)).sum(dim=-1))
    torch.testing.assert_close(value, torch.cat(expected), atol=1e-6, rtol=1e-5)
    assert value.min() >= 0 and value.max() > 0


@pytest.mark.parametrize(
    "adapter", [SteeringVectorConfig(layers=1), LoraConfig(r=2, target_modules="all-linear"), None]
)
@pytest.mark.parametrize("loss", ["lorra", "prompted", "context_distillation"])
def test_trains_any_adapter(loss, adapter, tmp_path):
    options = {} if adapter else {"ref_model": tiny()}
    made = trained(
        "dpo", tmp_path, loss=loss, views=seen_by(loss), peft_config=adapter, max_steps=8,
        learning_rate=0.01 if adapter else 1e-3, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    first, *_, last = losses(made)
    assert last < first


IA2 = get_loss("prompted", site="attention", layers="all", then="cross_entropy")


@pytest.mark.parametrize("loss", ["lorra", IA2, "context_distillation", get_loss("dpo", neutral_kl=0.3)])
def test_the_memo_changes_nothing(loss, tmp_path):
    views = seen_by(loss, neutral=get_view("neutral", rows=demonstrations(3, seed=7).to_list()))
    options = {"loss": loss, "views": views, "peft_config": SteeringVectorConfig(layers=1), "max_steps": 4}
    prefix = FrozenPrefix()
    ours = trained("dpo", tmp_path / "a", frozen_prefix=prefix, **options)
    plain = trained("dpo", tmp_path / "b", frozen_prefix=False, **options)
    assert len(prefix.memo) > 0
    for one, other in zip(values(ours.model).values(), values(plain.model).values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def divergence(made) -> float:
    """Of the trained model from its base on the neutral rows of a batch, in nats per token."""
    batch = Batch.read(next(iter(made.get_train_dataloader())))
    at = ModelAt(made.model, made.model, batch, views=made.views)
    ours, base = (at(s, view="neutral", distribution=True).distribution for s in (1, 0))
    return float((ours.exp() * (ours - base)).sum(dim=-1).mean())


def test_neutral_kl_keeps_neutral_text_as_it_was(tmp_path):
    views = {"neutral": get_view("neutral", rows=demonstrations(4, seed=7).to_list())}
    options = {"views": views, "max_steps": 20, "learning_rate": 0.03}
    free = trained("dpo", tmp_path / "free", loss=get_loss("dpo", neutral_kl=1e-9), **options)
    held = trained("dpo", tmp_path / "held", loss=get_loss("dpo", neutral_kl=100.0), **options)
    assert divergence(held) < divergence(free) / 3


def test_views_in_evaluation(tmp_path):
    made = trained("dpo", tmp_path, loss="lorra", views=BOTH, eval_dataset=pairs(3, seed=9), max_steps=1)
    assert made.evaluate()["eval_loss"] > 0


def test_views_of_several_evaluation_sets(tmp_path):
    evaluation, view = {"a": pairs(3, seed=9), "b": pairs(2, seed=10)}, get_view("demonstrations", k=2)
    options = {"loss": "prompted", "views": {"good": view}, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    made = trained("dpo", tmp_path, eval_dataset=evaluation, **options)
    logged = {key for entry in made.state.log_history for key in entry}
    assert {"eval_a_loss", "eval_b_loss"} <= logged
    mixed = Dataset.from_list([*pairs().to_list(), *evaluation["b"].to_list()[:1]])
    with pytest.raises(ViewError, match="are evaluation rows too"):
        trainer("dpo", tmp_path, data=mixed, eval_dataset=evaluation, **options)


@pytest.mark.parametrize("which", ["data", "eval_dataset"])
def test_views_of_a_stream_are_refused(which, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(pairs().to_list()))
    given = {"eval_dataset": {"a": stream}} if which == "eval_dataset" else {"data": stream}
    with pytest.raises(ViewError, match="before training, but these are a IterableDataset. Give a datasets.Dataset"):
        trainer("dpo", tmp_path, loss="lorra", views=BOTH, **given)


def test_they_do_not_train_together(tmp_path):
    made = [trainer("dpo", tmp_path / str(i), loss="lorra", views=BOTH) for i in range(2)]
    with pytest.raises(ValueError, match="views or hidden states"):
        train_together(made)


# -- one loss, then another ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "steps", "first"), [(0.5, 6, 3), (0.25, 8, 2), (0.01, 4, 1), (0.99, 4, 3), (0.5, 1, 1)]
)
def test_both_stages_get_their_steps(share, steps, first):
    loss = get_loss("prompted", then="cross_entropy", then_after=share)
    assert isinstance(loss, Staged)
    assert [loss.stage(step, steps) is loss.loss for step in range(steps)] == [i < first for i in range(steps)]


def test_stages_follow_each_other_and_resume(tmp_path):
    loss = get_loss("prompted", layers=2, then="dpo")
    options = {"peft_config": SteeringVectorConfig(layers=1), "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 4}
    second = trained("dpo", tmp_path / "second", loss="dpo", **options)
    options["views"] = {"good": GOOD}
    staged = trained("dpo", tmp_path / "staged", loss=loss, **options)
    first = trained("dpo", tmp_path / "first", loss=get_loss("prompted", layers=2), **options)
    assert losses(staged)[:3] == losses(first)[:3], "half of the steps are the first loss's"
    assert losses(staged)[3] == pytest.approx(losses(second)[0], abs=0.02), "then it is DPO, about log 2 at first"
    resumed = trainer("dpo", tmp_path / "staged", loss=loss, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "staged" / "checkpoint-4"))
    for one, other in zip(values(resumed.model).values(), values(staged.model).values(), strict=True):
        assert torch.equal(one, other)
    evaluation = staged.evaluate(pairs(3, seed=9))["eval_loss"]
    assert evaluation == pytest.approx(second.evaluate(pairs(3, seed=9))["eval_loss"], abs=0.1), "DPO too"


def test_stages_that_cannot_be(tmp_path):
    for share in (0.0, 1.0, True):
        with pytest.raises(ValueError, match="then_after"):
            get_loss("prompted", then="cross_entropy", then_after=share)
    with pytest.raises(ValueError, match="Add these to the two losses"):
        get_loss("prompted", then="cross_entropy", neutral_kl=0.1)
    with pytest.raises(ValueError, match="site='head'"):
        get_loss("prompted", site="head")
    with pytest.raises(ViewError, match="good"):
        trainer("dpo", tmp_path, loss=get_loss("cross_entropy", then="prompted"))
    made = [trainer("dpo", tmp_path / str(i), loss=get_loss("dpo", then="bipo")) for i in range(2)]
    with pytest.raises(ValueError, match="changes during training"):
        train_together(made)
