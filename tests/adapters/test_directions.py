"""Directions in closed form: each against another route to the same numbers, and all against planted answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from paths import ROOT
from peft import PeftModel, get_peft_model
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.preprocessing import StandardScaler
from tiny_models import fill, steered, tiny, tokens, vector_of

from steertune.adapters import SteeringVectorConfig, directions
from steertune.adapters.analysis.activations import collect

WIDTH, LAYERS = 32, (0, 2)
BIPO = ROOT.parent / "shared" / "data" / "bipo" / "power-seeking.train.jsonl"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def joined(vectors: dict[int, torch.Tensor]) -> torch.Tensor:
    return torch.cat([vectors[i] for i in sorted(vectors)])


@pytest.fixture(scope="module")
def planted():
    """Pairs that differ by one direction a layer plus noise: `chosen, rejected, truth`."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    truth = {i: torch.nn.functional.normalize(randn(WIDTH), dim=0) for i in LAYERS}
    rejected = {i: 2 * randn(60, WIDTH) for i in LAYERS}
    chosen = {i: rejected[i] + 6 * truth[i] + 0.5 * randn(60, WIDTH) for i in LAYERS}
    return chosen, rejected, truth


@pytest.fixture(scope="module")
def batches():
    """Two batches of contrast pairs, padded on the right: `(2 * pairs, tokens)`, chosen answers first."""
    made = []
    for seed, (pairs, columns) in enumerate([(3, 9), (2, 7)]):
        ids = tokens(2 * pairs, columns, seed=seed)
        lengths = torch.randint(4, columns + 1, (2 * pairs, 1), generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(columns) < lengths).long()
        completion = mask * (torch.arange(columns) >= 2)
        made.append({"input_ids": ids * mask, "attention_mask": mask, "completion_mask": completion})
    return made


# -- the methods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", directions.names())
def test_every_method_finds_the_planted_direction(planted, name):
    chosen, rejected, truth = planted
    found = directions.get(name).fit(chosen, rejected)
    assert sorted(found) == list(LAYERS)
    assert all(found[i].shape == (WIDTH,) for i in LAYERS)
    # a probe turns away from directions of high variance, and one without labels has less to go by
    least = {"probe": 0.85, "sgd_probe": 0.8, "lda": 0.8, "ccs": 0.5}.get(name, 0.98)
    assert all(cosine(found[i], truth[i]) > least for i in LAYERS)


@pytest.mark.parametrize("name", directions.names())
def test_swapping_chosen_and_rejected_turns_the_direction_round(planted, name):
    chosen, rejected, _ = planted
    fit = directions.get(name).fit
    right, wrong = fit(chosen, rejected), fit(rejected, chosen)
    # the component of ICV's code keeps its own sign, and SGD has an order
    least = {"icv_released": 0.95, "sgd_probe": 0.99, "ccs": 0.9}.get(name, 0.999999)
    assert all(cosine(right[i], -wrong[i]) > least for i in LAYERS)


def test_mean_difference_needs_no_pairing(planted):
    chosen, rejected, _ = planted
    found = directions.get("mean_difference").fit(chosen, rejected)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for i in LAYERS:
        torch.testing.assert_close(found[i], (chosen[i] - rejected[i]).mean(dim=0))
        torch.testing.assert_close(found[i], (chosen[i] - rejected[i][order]).mean(dim=0))


def test_icv_is_the_first_eigenvector_over_all_layers_together(planted):
    chosen, rejected, _ = planted
    found = joined(directions.get("icv").fit(chosen, rejected))
    differences = torch.cat([chosen[i] - rejected[i] for i in LAYERS], dim=1).double().numpy()
    _, vectors = np.linalg.eigh(differences.T @ differences)
    assert abs(cosine(found, torch.from_numpy(vectors[:, -1]))) == pytest.approx(1, abs=1e-6)
    svd = TruncatedSVD(n_components=1, algorithm="arpack").fit(differences)
    assert abs(cosine(found, torch.from_numpy(svd.components_[0]))) == pytest.approx(1, abs=1e-6)
    assert found.norm().item() == pytest.approx(1, abs=1e-6)
    assert found @ torch.from_numpy(differences).float().mean(dim=0) > 0


def test_icv_released_is_the_formula_of_its_code_and_nearly_the_mean_difference(planted):
    chosen, rejected, _ = planted
    found = joined(directions.get("icv_released").fit(chosen, rejected))
    mean = joined(directions.get("mean_difference").fit(chosen, rejected))
    assert (found - mean).norm().item() == pytest.approx(1, abs=1e-5)  # the component, of length 1
    # activations of a real model are long, which is why the component vanishes beside the mean
    long = directions.get("icv_released").fit(*({i: 50 * x for i, x in side.items()} for side in (chosen, rejected)))
    assert cosine(joined(long), mean) >= 0.999


def test_lat_is_pca_of_pairs_in_both_orders_with_the_sign_of_the_mean(planted):
    chosen, rejected, _ = planted
    found = directions.get("lat").fit(chosen, rejected)
    for i in LAYERS:
        differences = chosen[i] - rejected[i]
        pca = PCA(n_components=1).fit(torch.cat([differences, -differences]).double().numpy())
        assert abs(cosine(found[i], torch.from_numpy(pca.components_[0]))) == pytest.approx(1, abs=1e-6)
        assert found[i] @ differences.mean(dim=0) > 0
        assert found[i].norm().item() == pytest.approx(1, abs=1e-5)


def test_lda_is_the_mean_difference_whitened_by_the_shrunk_covariance(planted):
    chosen, rejected, _ = planted
    found = directions.get("lda").fit(chosen, rejected)
    for i in LAYERS:
        within = [
            LedoitWolf().fit(StandardScaler().fit_transform(side[i].double())).covariance_
            * np.outer(*[side[i].double().std(dim=0, correction=0).numpy()] * 2)
            for side in (chosen, rejected)
        ]  # scikit-learn shrinks standardised features
        gap = (chosen[i] - rejected[i]).mean(dim=0).double().numpy()
        assert cosine(found[i], torch.from_numpy(np.linalg.solve(sum(within) / 2, gap))) > 0.999999


def test_sgd_probe_comes_near_the_probe_that_is_solved_to_the_end(planted):
    chosen, rejected, _ = planted
    sgd, solved = (directions.get(name).fit(chosen, rejected) for name in ("sgd_probe", "probe"))
    assert all(cosine(sgd[i], solved[i]) > 0.85 for i in LAYERS)


def test_ccs_reads_without_labels_and_says_when_it_cannot():
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    rejected = torch.randn(200, 8, generator=generator)
    chosen = torch.randn(200, 8, generator=generator) + 4 * truth
    fit = directions.get("ccs").fit
    found = fit({0: chosen}, {0: rejected})[0]
    assert cosine(found, truth) > 0.9
    # which answer is called chosen decides its sign and nothing else
    flip = torch.rand(200, 1, generator=generator) < 0.3
    mixed = fit({0: torch.where(flip, rejected, chosen)}, {0: torch.where(flip, chosen, rejected)})[0]
    assert cosine(mixed, truth) > 0.9
    with pytest.raises(ValueError, match="at least 4 pairs, got 3"):
        fit({0: chosen[:3]}, {0: rejected[:3]})


def test_ccs_loss_by_hand(monkeypatch):
    """Without a step the best start is the one whose loss, written out, is smallest."""
    module = directions.get("ccs")
    monkeypatch.setattr(module, "_STEPS", 1)
    monkeypatch.setattr(module, "_RATE", 0.0)
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    starts = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)) / 2
    sides, spread = [], torch.zeros(4)
    for first, second in ((chosen, rejected), (rejected, chosen)):
        side = torch.stack([(second if i % 2 else first)[i] for i in range(6)])
        sides.append((side - side.mean(dim=0)) / side.std(dim=0))
        spread += side.std(dim=0)
    losses = []
    for w in starts:
        p, q = (1 / (1 + torch.exp(-side @ w)) for side in sides)
        losses.append(float((((p - (1 - q)) ** 2) + torch.minimum(p, q) ** 2).mean()))
    # found on scaled states, given for states as they are
    best = starts[int(np.argmin(losses))] / spread
    assert abs(cosine(module.fit({0: chosen}, {0: rejected})[0], best)) == pytest.approx(1, abs=1e-6)


def test_probe_separates_what_it_has_not_seen(planted):
    chosen, rejected, _ = planted
    found = directions.get("probe").fit({0: chosen[0][:40]}, {0: rejected[0][:40]})[0]
    middle = (chosen[0][:40].mean(dim=0) + rejected[0][:40].mean(dim=0)) / 2
    right = [((chosen[0][40:] - middle) @ found > 0), ((rejected[0][40:] - middle) @ found < 0)]
    assert torch.cat(right).float().mean() > 0.85


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match=r"direction='mean_diference'.*Did you mean 'mean_difference'"):
        directions.get("mean_diference")


def test_one_pair_is_enough_for_what_needs_no_spread():
    one = ({0: torch.ones(1, WIDTH)}, {0: torch.zeros(1, WIDTH)})
    for name in ("mean_difference", "icv", "lat", "probe", "lda", "sgd_probe"):
        assert cosine(directions.get(name).fit(*one)[0], torch.ones(WIDTH)) == pytest.approx(1, abs=1e-5)


# -- reading activations --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pool", ["completion_mean", "last"])
def test_collected_states_are_hidden_states_pooled_by_hand(batches, pool):
    model = tiny()
    found = collect(model, batches, layers=[0, 1, 2], pool=pool)
    for i in (0, 1, 2):
        sides, lengths = ([], []), []
        for batch in batches:
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            states = model(**inputs, output_hidden_states=True).hidden_states[i + 1]
            for row, (state, mask) in enumerate(zip(states, batch["completion_mask"], strict=True)):
                answer = [state[t] for t in range(len(mask)) if mask[t]]
                pooled = answer[-1] if pool == "last" else sum(answer) / len(answer)
                sides[row >= len(states) // 2].append(pooled)
            lengths += [s.norm().item() for s in states[batch["attention_mask"].bool()]]
        torch.testing.assert_close(found.chosen[i], torch.stack(sides[0]))
        torch.testing.assert_close(found.rejected[i], torch.stack(sides[1]))
        assert found.residual_norms[i] == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("site", ["block", "attention", "mlp"])
def test_collecting_does_not_depend_on_padding(batches, site):
    right = collect(tiny(), batches, site=site)
    flipped = []
    for batch in batches:
        shift = (batch["attention_mask"] == 0).sum(dim=1)
        rolled = {
            k: torch.stack([row.roll(int(s)) for row, s in zip(v, shift, strict=True)]) for k, v in batch.items()
        }
        assert rolled["attention_mask"][:, -1].all()
        flipped.append(rolled)
    left = collect(tiny(), flipped, site=site)
    for i in right.chosen:
        torch.testing.assert_close(left.chosen[i], right.chosen[i], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(left.rejected[i], right.rejected[i], rtol=1e-4, atol=1e-6)
        assert left.residual_norms[i] == pytest.approx(right.residual_norms[i], rel=1e-4)


def native_model():
    model = tiny()
    model.add_adapter(SteeringVectorConfig(layers="all"))
    fill(model)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: steered(layers="all"), lambda: steered(layers="all", modules_to_save=["lm_head"]), native_model],
    ids=["peft", "modules_to_save", "transformers"],
)
def test_collecting_reads_the_base_and_leaves_the_model_as_it_was(batches, make):
    expected, model = collect(tiny(), batches), make()
    model.train()
    with torch.no_grad():
        before = model(input_ids=tokens()).logits
    found = collect(model, batches)
    assert all(torch.equal(found.chosen[i], expected.chosen[i]) for i in expected.chosen)
    assert model.training
    assert vector_of(model).requires_grad
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, before)


def test_nothing_to_collect(batches):
    with pytest.raises(ValueError, match="at least one example"):
        collect(tiny(), [])
    empty = {k: v.clone() for k, v in batches[0].items()}
    empty["completion_mask"][1] = 0
    for pool in ("completion_mean", "last"):
        with pytest.raises(ValueError, match="An answer has no tokens"):
            collect(tiny(), [empty], pool=pool)


# -- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form, rank", [("bias", 1), ("gated", 1), ("low_rank", 3)])
def test_untrained_activation_addition_is_adding_by_hand(batches, form, rank, tied):
    layers = [1, 2]
    config = SteeringVectorConfig(
        layers=layers, tied=tied, form=form, rank=rank, init="mean_difference", init_scale=3.0
    )
    model = get_peft_model(tiny(), config).eval()
    direction = directions.compute("mean_difference", model, batches)
    direction.write(model)
    by_hand = tiny()
    for i in layers:
        vector = 3.0 * direction.vectors[1 if tied else i]
        by_hand.model.layers[i].register_forward_hook(lambda module, args, output, v=vector: output + v)
    with torch.no_grad():
        found, expected = model(input_ids=tokens()).logits, by_hand(input_ids=tokens()).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, tiny()(input_ids=tokens()).logits, atol=1e-3)


def test_what_a_direction_records(batches):
    one, same = (directions.compute("lat", tiny(), batches, layers=[2]) for _ in range(2))
    assert (one.method, one.pool, one.site, one.pairs) == ("lat", "last", "block", 5)
    assert list(one.vectors) == [2]
    assert one.norms[2] == pytest.approx(1, abs=1e-5)
    assert one.data_sha256 == same.data_sha256
    assert torch.equal(one.vectors[2], same.vectors[2])
    assert one.data_sha256 != directions.compute("lat", tiny(), batches[:1], layers=[2]).data_sha256


def test_writing_tells_a_relative_norm_its_residual_norms(batches, tmp_path):
    config = SteeringVectorConfig(layers=2, norm="relative", norm_value=0.5, init="mean_difference")
    model = get_peft_model(tiny(), config).eval()
    direction = directions.compute("mean_difference", model, batches)
    direction.write(model)
    expected = tiny()
    step = 0.5 * direction.residual_norms[2] * torch.nn.functional.normalize(direction.vectors[2], dim=0)
    expected.model.layers[2].register_forward_hook(lambda module, args, output: output + step)
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected(input_ids=tokens()).logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_writing_into_one_adapter_leaves_the_others(batches):
    model = steered(layers=2)
    model.add_adapter("other", SteeringVectorConfig(layers=2))
    before = vector_of(model).clone()
    direction = directions.compute("mean_difference", model, batches)
    direction.write(model, "other")
    assert torch.equal(vector_of(model), before)
    assert torch.equal(vector_of(model, "other"), direction.vectors[2])


def test_writing_where_it_does_not_fit(batches):
    direction = directions.compute("mean_difference", tiny(), batches, layers=[0, 2])
    with pytest.raises(ValueError, match=r"covers layers \[0, 2\]; adapter 'default' has layers \[1\] too"):
        direction.write(steered(layers=[1, 2]))
    with pytest.raises(ValueError, match="adapter 'nobody' has no steering layer"):
        direction.write(steered(), "nobody")


def test_a_direction_steers_towards_the_chosen_answers(batches):
    """The planted bug: with the answers swapped the same check must fail."""
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2, init="mean_difference")).eval()
    reference = directions.compute("mean_difference", tiny(), batches)
    swapped = [{k: torch.cat(v.chunk(2)[::-1]) for k, v in batch.items()} for batch in batches]
    for data, sign in ((batches, 1), (swapped, -1)):
        directions.compute("mean_difference", model, data).write(model)
        with torch.no_grad():
            after = model(input_ids=tokens(), output_hidden_states=True).hidden_states[3]
            with model.disable_adapter():
                before = model(input_ids=tokens(), output_hidden_states=True).hidden_states[3]
        assert ((after - before) @ reference.vectors[2] * sign > 0).all()


# -- a real model on real data --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_activations(real):
    """The 12 shortest pairs of BiPO's power-seeking data, on all layers."""
    if not BIPO.exists():
        pytest.skip(f"needs {BIPO}")
    model, tokenizer = real
    rows = [json.loads(line) for line in BIPO.read_text().splitlines()]
    rows = sorted(rows, key=lambda row: len(str(row)))[:12]
    batches = []
    for start in range(0, len(rows), 4):
        texts, prompts = [], []
        for side in ("chosen", "rejected"):
            for row in rows[start : start + 4]:
                prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
                prompts.append(len(tokenizer(prompt, add_special_tokens=False).input_ids))
                texts.append(prompt + row[side][0]["content"])
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
        after = torch.arange(batch.input_ids.shape[1]) >= torch.tensor(prompts)[:, None]
        batches.append({**batch, "completion_mask": batch.attention_mask * after})
    return collect(model, batches, pool="last")


@pytest.mark.real
def test_icv_released_is_the_mean_difference_on_real_data(real_activations):
    both = real_activations.chosen, real_activations.rejected
    fitted = {name: joined(directions.get(name).fit(*both)) for name in ("icv", "icv_released", "mean_difference")}
    assert cosine(fitted["icv_released"], fitted["mean_difference"]) >= 0.999
    assert cosine(fitted["icv"], fitted["mean_difference"]) < 0.999


@pytest.mark.real
def test_a_mean_difference_separates_answers_it_has_not_seen(real_activations):
    chosen, rejected = real_activations.chosen[15], real_activations.rejected[15]
    right = []
    for i in range(len(chosen)):  # leave one out
        rest = [j for j in range(len(chosen)) if j != i]
        direction = directions.get("mean_difference").fit({15: chosen[rest]}, {15: rejected[rest]})[15]
        right.append(((chosen[i] - rejected[i]) @ direction > 0).item())
    assert sum(right) >= 0.7 * len(right)
