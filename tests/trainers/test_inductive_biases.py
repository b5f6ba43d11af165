"""Inductive biases for ordinary training: each does what its formula says, on LoRA and on the whole model."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from one_step import SGD, gradients, lora
from tiny_data import arguments, demonstrations, history, pairs, tokenizer, trained, trainer
from tiny_models import tiny

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.analysis.activations import collect
from steertune.adapters.observing import base_model
from steertune.losses import Outputs, get_loss
from steertune.trainers import BiasError, FrozenPrefix, SteeringTrainer, get_bias
from steertune.trainers.inductive_biases import names
from steertune.trainers.initial_vectors import pair_batches

# -- one_write --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [lora(), None], ids=["lora", "full"])
@pytest.mark.parametrize(("site", "maps"), [("mlp", {"down_proj"}), ("attention", {"o_proj"}),
                                            ("both", {"down_proj", "o_proj"})])  # fmt: skip
def test_one_write_trains_what_one_block_writes(site, maps, config, tmp_path):
    biases = {"one_write": {"layer": 2, "site": site}}
    own = {"ref_model": tiny()} if config is None else {}
    made = trainer("dpo", tmp_path, loss="dpo", peft_config=config, inductive_biases=biases, **own, **SGD)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("layers.2." in name for name in moved)
    assert {part for name in moved for part in name.split(".") if part.endswith("_proj")} == maps
    sizes = {name: p.numel() for name, p in made.model.named_parameters()}
    counted = made.get_num_trainable_parameters()
    assert counted == sum(p.numel() for group in made.optimizer.param_groups for p in group["params"])
    assert sum(sizes[name] for name in moved) <= counted < sum(sizes.values()), "a gradient may be zero at the start"


def test_one_write_where_nothing_is_trained(tmp_path):
    made = trainer(
        "dpo", tmp_path, loss="dpo", peft_config=lora(target_modules=["q_proj"]), inductive_biases=["one_write"]
    )
    with pytest.raises(BiasError, match="no trained parameter is there"):
        made.train()


# -- rank_one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [lora(), None], ids=["lora", "full"])
def test_rank_one_is_the_best_approximation(config, tmp_path):
    plain = gradients(tmp_path / "plain", [], config=config)
    found = gradients(tmp_path / "biased", ["rank_one"], config=config)
    several = 0
    for name, gradient in plain.items():
        if gradient.ndim < 2:
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
            continue
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        torch.testing.assert_close(found[name], s[0] * torch.outer(u[:, 0], v[0]), atol=2e-6, rtol=1e-3)
        several += int(s[1] > 1e-3 * s[0])
    assert several, "some gradient was of higher rank before"


def test_rank_one_of_large_matrices_is_that_of_small_ones():
    """Large matrices take a random projection, which must come to the same and move nobody's random numbers."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(120, 90))

    class Trainer:
        model = Model()

    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(120, 90, generator=generator) * 0.1 + 3 * torch.outer(
        torch.randn(120, generator=generator), torch.randn(90, generator=generator)
    )
    Trainer.model.weight.grad = gradient.clone()
    state = torch.get_rng_state()
    get_bias("rank_one").gradients(Trainer)
    assert torch.equal(torch.get_rng_state(), state)
    u, s, v = torch.linalg.svd(gradient)
    torch.testing.assert_close(Trainer.model.weight.grad, s[0] * torch.outer(u[:, 0], v[0]), atol=1e-3, rtol=1e-3)


# -- position_average -------------------------------------------------------------------------------------------------


def by_hand(made) -> dict[str, torch.Tensor]:
    """The formula, row by row and position by position, from what a plain backward pass shows."""
    seen: list[tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]] = []

    def keep(module, args, output):
        output.register_hook(lambda delta: seen.append((module, args[0].detach(), delta)))

    maps = {m: n for n, m in made.model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad}
    handles = [m.register_forward_hook(keep) for m in maps]
    loss = made.compute_loss(made.model.train(), next(iter(made.get_train_dataloader())))
    loss.backward()
    for handle in handles:
        handle.remove()
    made.model.zero_grad()
    found = {f"{name}.weight": torch.zeros_like(module.weight) for module, name in maps.items()}
    for module, inputs, delta in seen:
        for x, d in zip(inputs, delta, strict=True):
            there = [t for t in range(len(d)) if d[t].abs().sum() > 0]
            if there:
                mean = sum(x[t] for t in there) / len(there)
                found[f"{maps[module]}.weight"] += torch.outer(sum(d[t] for t in there), mean)
    return found


@pytest.mark.parametrize("config", [lora(), None], ids=["lora", "full"])
def test_position_average_by_hand(config, tmp_path):
    options = dict(loss="cross_entropy", data=demonstrations(4), per_device_train_batch_size=4, frozen_prefix=False)
    found = gradients(tmp_path / "biased", ["position_average"], kind="sft", config=config, **options)
    made = trainer("sft", tmp_path / "plain", peft_config=config, **options, **SGD)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    expected = by_hand(made)
    plain = gradients(tmp_path / "again", [], kind="sft", config=config, **options)
    different = 0
    expected.pop("lm_head.weight", None)  # which keeps its gradient
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)
        different += int(not torch.allclose(found[name], plain[name], atol=1e-4))
    assert different, "the average is not the gradient itself"


def test_position_average_adds_up_over_micro_batches_and_starts_anew_with_every_step(tmp_path):
    options = dict(kind="sft", config=lora(), loss="cross_entropy", data=demonstrations(4), frozen_prefix=False)
    at_once = gradients(tmp_path / "a", ["position_average"], per_device_train_batch_size=4, **options)
    in_parts = gradients(
        tmp_path / "b", ["position_average"], per_device_train_batch_size=1, gradient_accumulation_steps=4, **options
    )
    for name, gradient in at_once.items():
        torch.testing.assert_close(in_parts[name], gradient, atol=1e-5, rtol=1e-3)
    # two steps of a rate of zero: the second gradient is not the sum of two
    twice = trainer("sft", tmp_path / "c", peft_config=lora(), inductive_biases=["position_average"],
                    loss="cross_entropy", data=demonstrations(4), per_device_train_batch_size=4, frozen_prefix=False,
                    **{**SGD, "learning_rate": 0.0, "max_steps": 2, "logging_steps": 1})  # fmt: skip
    twice.train()
    norms = [line["grad_norm"] for line in history(twice, "grad_norm")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_the_memo_and_shared_prompts_leave_the_average_as_it_is(kind, tmp_path):
    """Pairs whose prompts could run once, and rows whose lower layers are known."""
    options = dict(
        kind=kind,
        config=lora(layers_to_transform=[2, 3], target_modules=["o_proj", "down_proj"]),
        loss="dpo" if kind == "dpo" else "cross_entropy",
        data=pairs(4) if kind == "dpo" else demonstrations(4),
    )
    plain = gradients(tmp_path / "plain", ["position_average"], frozen_prefix=False, **options)
    prefix = FrozenPrefix()
    ours = gradients(tmp_path / "memo", ["position_average"], frozen_prefix=prefix, **options)
    assert len(prefix.memo) > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_head_and_tied_embeddings_keep_their_gradient(tmp_path):
    options = dict(kind="sft", loss="cross_entropy", data=demonstrations(4), config=None, frozen_prefix=False)
    for tied in (True, False):
        made = [
            gradients(
                tmp_path / f"{tied}{len(biases)}",
                biases,
                model=lambda tied=tied: tiny(tie_word_embeddings=tied),
                **options,
            )
            for biases in ([], ["position_average"])
        ]
        ends = [name for name in made[0] if "embed_tokens" in name or "lm_head" in name]
        assert len(ends) == (1 if tied else 2)
        for name in ends:
            torch.testing.assert_close(made[1][name], made[0][name])
        assert any(not torch.allclose(made[1][name], made[0][name], atol=1e-5) for name in made[0])


def test_gpt2_keeps_its_weights_the_other_way_round(tmp_path):
    """A Conv1D is a linear map with a transposed weight."""
    options = dict(kind="sft", loss="cross_entropy", data=demonstrations(3), config=None, frozen_prefix=False,
                   per_device_train_batch_size=3)  # fmt: skip
    found = gradients(tmp_path / "a", ["position_average"], model=lambda: tiny("gpt2"), **options)
    for name in ("transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"):
        s = torch.linalg.svdvals(found[name])
        assert s[3] < 1e-5 * s[0] < s[2], "three rows: a gradient of rank three at most"


def test_matrices_that_cannot_be_averaged_are_refused(tmp_path):
    made = trainer("sft", tmp_path / "a", model=tiny("mixtral"), loss="cross_entropy", peft_config=None,
                   inductive_biases=["position_average"])  # fmt: skip
    with pytest.raises(BiasError, match="experts.*are trained too"):
        made.train()


# -- the cap ----------------------------------------------------------------------------------------------------------


def states(norms: list[float], rows: int = 2) -> Outputs:
    mask = torch.ones(rows, len(norms) // rows, dtype=torch.bool)
    hidden = torch.zeros(len(norms), 3)
    hidden[:, 1] = torch.tensor(norms)
    return Outputs(torch.full(mask.shape, -1.0), mask, {2: hidden})


@pytest.mark.parametrize("loss", ["cross_entropy", "simpo"])
def test_the_cap_by_hand(loss):
    # changes of 1, 4, 2 and 6 under a cap of 2: over by 0, 1, 0 and 2 times the cap
    def at(strength, layers=(), **_):
        return states([1.0, 4.0, 2.0, 6.0] if strength == 1 else [0.0] * 4)

    plain = get_loss(loss)(at)
    found = get_loss(loss, change_cap=2.0, cap_layers=2, cap_weight=0.5)(at)
    per_row = torch.tensor([(0 + 1) / 2, (0 + 4) / 2]) * 0.5
    if loss == "simpo":  # a pair is a chosen and a rejected row
        torch.testing.assert_close(found - plain, per_row.mean()[None])
    else:
        torch.testing.assert_close((found - plain)[plain != 0], per_row.repeat_interleave(2))


def test_the_cap_holds_the_change_down_and_is_a_cap_only(tmp_path):
    change = {}
    for cap in (0.0, 1e3, 0.05):
        options = {"change_cap": cap, "cap_layers": 2, "cap_weight": 10.0} if cap else {}
        made = trained("dpo", tmp_path / str(cap), loss=get_loss("dpo", beta=1.0, **options), peft_config=lora(),
                       learning_rate=1e-2, max_steps=12)  # fmt: skip
        batches = pair_batches(made)
        model = made.model.eval()
        batch = {k: v for k, v in batches[0].items() if k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            on = model(**batch, output_hidden_states=True).hidden_states[3]
            with model.disable_adapter():
                off = model(**batch, output_hidden_states=True).hidden_states[3]
        change[cap] = float((on - off).norm(dim=-1)[batches[0]["completion_mask"].bool()].mean())
    assert change[1e3] == pytest.approx(change[0.0], rel=1e-3), "a cap that is never met changes nothing"
    assert change[0.05] < change[0.0] / 2


@pytest.mark.parametrize(("options", "message"), [({"change_cap": -1.0}, "change_cap"),
                                                  ({"change_cap": 1.0, "cap_weight": 0.0}, "cap_weight"),
                                                  ({"change_cap": 1.0, "cap_layers": []}, "layers=")])  # fmt: skip
def test_impossible_caps(options, message):
    with pytest.raises(ValueError, match=message):
        get_loss("dpo", **options)


# -- what they have in common -----------------------------------------------------------------------------------------


def test_names_and_options_are_checked(tmp_path):
    assert {"beside_lora", "direction_start", "one_write", "position_average", "rank_one"} < set(names())
    with pytest.raises(ValueError, match=r"Unknown bias 'rank_on'.*Did you mean 'rank_one"):
        trainer("dpo", tmp_path, loss="dpo", inductive_biases=["rank_on"])
    with pytest.raises(ValueError, match=r"option of bias 'one_write' 'laier'.*Did you mean 'layer'"):
        get_bias("one_write", laier=3)
    with pytest.raises(ValueError, match="site='block'"):
        get_bias("one_write", site="block")


@pytest.mark.parametrize("name", ["rank_one", "position_average", "one_write"])
def test_a_steering_vector_needs_none_of_them(name, tmp_path):
    made = trainer("dpo", tmp_path, loss="dpo", peft_config=SteeringVectorConfig(layers=2), inductive_biases=[name])
    with pytest.raises(BiasError):
        made.train()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "biases", [{"direction_start": {"layer": 2}}, ["position_average"], ["rank_one"], ["one_write"]]
)
def test_a_resumed_run_comes_out_the_same(biases, tmp_path):
    options = dict(loss="dpo", peft_config=lora(lora_bias=True), inductive_biases=biases, save_strategy="steps",
                   save_steps=2, learning_rate=1e-2, lr_scheduler_type="constant")  # fmt: skip
    straight = trained("dpo", tmp_path / "a", max_steps=4, **options)
    trained("dpo", tmp_path / "b", max_steps=2, **options)
    resumed = trainer("dpo", tmp_path / "b", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    for (name, one), (_, other) in zip(
        straight.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_directions_are_read_before_anything_is_written(tmp_path):
    """The start is computed on the base, whatever the adapter is."""
    made = trainer(
        "dpo",
        tmp_path,
        loss="dpo",
        peft_config=lora(lora_bias=True),
        inductive_biases={"direction_start": {"layer": 2}},
    )
    expected = collect(tiny(), pair_batches(made), [2])
    made._unstarted_biases[0].start(made)
    found = next(
        p
        for n, p in base_model(made.model).named_parameters()
        if "layers.2.mlp.down_proj.lora_B" in n and n.endswith("bias")
    )
    gap = expected.chosen[2].mean(dim=0) - expected.rejected[2].mean(dim=0)
    torch.testing.assert_close(found * 2, gap, atol=1e-5, rtol=1e-4)  # lora_alpha / r = 2


# -- what is left behind, and what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [["one_write"], ["position_average"], ["rank_one"], {"direction_start": {}}])
def test_nothing_is_left_on_the_model(biases, tmp_path):
    made = trained("dpo", tmp_path, loss="dpo", peft_config=lora(lora_bias=True), inductive_biases=biases, max_steps=1)
    for module in made.model.modules():
        assert not module._forward_hooks or "Steering" in type(module).__name__
    hooked = [name for name, p in made.model.named_parameters() if p._post_accumulate_grad_hooks]
    assert hooked == []
    assert all(p.requires_grad for name, p in made.model.named_parameters() if ".default." in name)
    assert [type(c).__name__ for c in made.callback_handler.callbacks].count("_Steps") == 0


def test_a_refused_bias_is_refused_again(tmp_path):
    biases = {"direction_start": {"layer": 2}, "one_write": {"layer": 1}}
    config = lora(lora_bias=True, layers_to_transform=[2, 3], target_modules=["down_proj"])
    made = trainer("dpo", tmp_path, loss="dpo", peft_config=config, inductive_biases=biases)
    for _ in range(2):
        with pytest.raises(BiasError, match="no trained parameter is there"):
            made.train()
    starts = [
        p for n, p in made.model.named_parameters() if "layers.2.mlp.down_proj.lora_B" in n and n.endswith("bias")
    ]
    gap = collect(tiny(), pair_batches(made), [2])
    expected = gap.chosen[2].mean(dim=0) - gap.rejected[2].mean(dim=0)
    torch.testing.assert_close(starts[0] * 2, expected, atol=1e-5, rtol=1e-4)  # once, not with every try


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_have_no_one_write(model_type, tmp_path):
    made = trainer("dpo", tmp_path, model=tiny(model_type), ref_model=tiny(model_type), loss="dpo", peft_config=None,
                   inductive_biases={"one_write": {"layer": 2}})  # fmt: skip
    with pytest.raises(BiasError, match="writes through experts"):
        made.train()


def test_a_block_without_an_mlp_has_no_write(tmp_path):
    made = trainer("dpo", tmp_path, model=tiny("opt"), ref_model=tiny("opt"), loss="dpo", peft_config=None,
                   inductive_biases=["one_write"])  # fmt: skip
    with pytest.raises(BiasError, match="mlp"):
        made.train()


def test_the_reference_does_not_move_along(tmp_path):
    """Biases of the base model stay when an adapter is switched off."""
    config = lora(bias="all")
    with pytest.raises(ValueError, match="trains biases of the base model"):
        trainer("dpo", tmp_path, model=tiny(mlp_bias=True), loss="dpo", peft_config=config)
    made = trainer("sft", tmp_path, model=tiny(mlp_bias=True), loss="cross_entropy", peft_config=config,
                   inductive_biases=["direction_start"])  # fmt: skip
    with pytest.raises(BiasError, match="can hold a constant"):
        made.train()


def test_model_init_and_biases_do_not_go_together(tmp_path):
    with pytest.raises(BiasError, match="model_init"):
        SteeringTrainer(
            model_init=tiny, args=arguments("plain", tmp_path), train_dataset=pairs(), processing_class=tokenizer(),
            loss="dpo", peft_config=None, inductive_biases=["rank_one"],
        )  # fmt: skip


def test_rank_one_of_experts_and_of_a_gradient_that_is_not_finite():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.Parameter(torch.zeros(3, 6, 5))
            self.broken = torch.nn.Parameter(torch.zeros(4, 4))

    class Trainer:
        model = Model()

    gradient = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    Trainer.model.experts.grad, Trainer.model.broken.grad = gradient.clone(), torch.full((4, 4), torch.nan)
    get_bias("rank_one").gradients(Trainer)
    for found, plain in zip(Trainer.model.experts.grad, gradient, strict=True):
        u, s, v = torch.linalg.svd(plain)
        torch.testing.assert_close(found, s[0] * torch.outer(u[:, 0], v[0]), atol=1e-5, rtol=1e-4)
    assert Trainer.model.broken.grad.isnan().all(), "the trainer's own check names it"


def test_a_loss_that_looks_below_all_that_is_trained_is_refused(tmp_path):
    loss = get_loss("dpo", change_cap=0.1, cap_layers=1)
    made = trainer(
        "dpo", tmp_path / "a", loss=loss, peft_config=lora(target_modules=["o_proj"], layers_to_transform=[2, 3])
    )
    with pytest.raises(ValueError, match=r"Capped reads the states of layers \[1\].*trained is 2"):
        made.train()
    trained("dpo", tmp_path / "b", loss=loss, peft_config=SteeringVectorConfig(layers=1), max_steps=1)
    held = trainer("dpo", tmp_path / "d", loss=loss, peft_config=lora(), inductive_biases={"one_write": {"layer": 2}})
    with pytest.raises(ValueError, match=r"Capped reads the states of layers \[1\].*trained is 2"):
        held.train()
    nested = get_loss("dpo", beta=0.5, contrast="unpaired", change_cap=1.0)
    trainer("dpo", tmp_path / "c", loss=nested, peft_config=lora(), beta=0.5)


# -- the former name ------------------------------------------------------------------------------------------------


def test_the_former_argument_works_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="biases= is now inductive_biases="):
        made = trainer("dpo", tmp_path, loss="dpo", peft_config=lora(), biases=["rank_one"])
    assert made.inductive_biases == [get_bias("rank_one")]
    with pytest.raises(TypeError, match="Give only inductive_biases="):
        trainer("dpo", tmp_path, loss="dpo", peft_config=lora(), biases=["rank_one"], inductive_biases=["rank_one"])


def test_the_former_module_works_with_a_warning():
    sys.modules.pop("steertune.trainers.biases", None)
    with pytest.warns(FutureWarning, match="is now steertune.trainers.inductive_biases"):
        former = importlib.import_module("steertune.trainers.biases")
    assert former.get_bias is get_bias and former.names() == names()
