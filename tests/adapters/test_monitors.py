"""Monitors read what the model computes, flag no more than they state, and load on their own model alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_data import tokenizer
from tiny_models import steered, tiny, tokens, vector_of

from steertune.adapters import monitors, set_strength
from steertune.adapters.monitors import MonitorError, choose_threshold, fits, pooling
from steertune.adapters.monitors.monitor import standardised

LAYER = 2


def batch(rows: int = 4, columns: int = 9, prompt: int = 3) -> dict[str, torch.Tensor]:
    """Rows of several lengths, padded on the right, with a prompt of 3 tokens."""
    ids = tokens(rows, columns)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, columns - row :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def made(model=None, layer: int = LAYER, site: str = "block", name: str = "mean", **options) -> monitors.Monitor:
    """A monitor of a random direction."""
    states = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    return monitors.make_monitor(
        "mean_difference", pooling.get(name, **options), tiny() if model is None else model, tokenizer(), layer,
        (states[:8] + 1, states[8:]), site,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mean", {}, 2.0),
        ("max", {}, 5.0),
        ("last", {}, 1.0),
        ("rolling_mean", {"window": 2}, 3.5),
        ("rolling_mean", {"window": 9}, 2.0),
        ("softmax", {"temperature": 1e-3}, 5.0),
        ("softmax", {"temperature": 1e6}, 2.0),
    ],
)
def test_pooling(name, options, expected):
    scores = torch.tensor([0.0, 5.0, 2.0, 1.0])
    assert float(pooling.get(name, **options)(scores)) == pytest.approx(expected, abs=1e-4)


def test_pooling_refuses_what_means_nothing():
    with pytest.raises(ValueError, match="window=0"):
        pooling.get("rolling_mean", window=0)
    with pytest.raises(ValueError, match="Did you mean 'softmax'"):
        pooling.get("softmaxx")


@pytest.mark.parametrize("site", ["block", "attention", "mlp"])
def test_scores_are_projections_of_the_states(site):
    model, monitor, given = tiny(), made(site=site), batch()
    kept = {}
    module = model.get_submodule(monitor.module)
    handle = module.register_forward_hook(lambda _, __, out: kept.update(h=out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(given["input_ids"], attention_mask=given["attention_mask"])
    handle.remove()
    expected = kept["h"] @ monitor.weight + monitor.bias
    for row, [scores] in enumerate(monitors.token_scores([monitor], model, [given])):
        read = given["labels"][row] != -100
        torch.testing.assert_close(scores, expected[row][read], atol=1e-4, rtol=1e-4)


def test_pooled_states_are_those_that_single_tokens_have():
    model, given = tiny(), batch()
    states = monitors.pooled_states(model, [given], [1, LAYER])
    monitor = made()
    by_token = [scores for [scores] in monitors.token_scores([monitor], model, [given])]
    along = states.mean[LAYER] @ monitor.weight + monitor.bias
    torch.testing.assert_close(along, torch.stack([scores.mean() for scores in by_token]), atol=1e-4, rtol=1e-4)
    last = states.last[LAYER] @ monitor.weight + monitor.bias
    torch.testing.assert_close(last, torch.stack([scores[-1] for scores in by_token]), atol=1e-4, rtol=1e-4)


def test_several_monitors_read_in_one_pass_what_each_reads_alone():
    model, given = tiny(), batch()
    several = [made(layer=layer, site=site) for layer in (0, 3) for site in ("block", "mlp")]
    together = [*monitors.token_scores(several, model, [given])]
    for place, monitor in enumerate(several):
        for row, [scores] in enumerate(monitors.token_scores([monitor], model, [given])):
            torch.testing.assert_close(together[row][place], scores)


@pytest.mark.parametrize(
    ("tokens_read", "counts"), [("answer", [6, 5, 4, 3]), ("prompt", [3] * 4), ("all", [9, 8, 7, 6])]
)
def test_tokens_that_are_read(tokens_read, counts):
    monitor = replace(made(), tokens=tokens_read)
    assert [len(scores) for [scores] in monitors.token_scores([monitor], tiny(), [batch()])] == counts


def test_a_vector_at_the_same_place_is_read_and_one_above_is_not():
    model = steered(layers=LAYER, positions="completion")
    given, at, below = batch(), made(), made(layer=LAYER - 1)
    shift = float(vector_of(model).detach() @ at.weight)
    scores = {}
    for strength in (0.0, 2.0):
        with set_strength(model, strength):
            scores[strength] = [*monitors.token_scores([at, below], model, [given])]
    for base, moved in zip(scores[0.0], scores[2.0], strict=True):
        torch.testing.assert_close(moved[0] - base[0], torch.full_like(base[0], 2 * shift), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(moved[1], base[1])


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_scores_while_generating_are_those_of_the_text(site):
    model = steered(layers=3)
    several = [made(layer=LAYER, site=site), made(layer=3)]
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0  # a shorter prompt, padded on the left
    with monitors.LiveScores(several, model, width=5) as live:
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 63, "pad_token_id": 0}
        out = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, start in ((0, 0), (1, 2)):
        text = out[row : row + 1, start:]
        labels = text.clone()
        labels[:, : 5 - start] = -100
        [scores] = monitors.token_scores(several, model, [{"input_ids": text, "labels": labels}])
        assert len(live.scores(row, 9)[0]) == 5, "the last token is chosen and never read"
        for while_generating, afterwards in zip(live.scores(row, 5), scores, strict=True):
            torch.testing.assert_close(while_generating, afterwards[:5], atol=1e-3, rtol=1e-3)
    with pytest.raises(MonitorError, match="tokens 'all'"):
        monitors.LiveScores([replace(several[0], tokens="all")], model, 5)


def test_reading_leaves_the_model_as_it_was():
    model = tiny().train()
    [*monitors.token_scores([made()], model, [batch()])]
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_score_is_in_standard_deviations_of_innocent_rows():
    innocent = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    weight, bias = standardised(torch.tensor([1.0, 0, 0, 2, 0, 0]), innocent)
    scores = innocent @ weight + bias
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4) and float(scores.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("bad", "least"), [(1, 0.6), (12, 0.9)])
@pytest.mark.parametrize("method", fits.names())
def test_every_fit_finds_few_bad_rows_among_many_innocent_ones(method, bad, least):
    draw = torch.Generator().manual_seed(bad)
    towards = torch.zeros(16)
    towards[0] = 4.0
    innocent = torch.randn(300, 16, generator=draw)
    direction = fits.get(method).fit(torch.randn(bad, 16, generator=draw) + towards, innocent)
    test = torch.randn(200, 16, generator=draw)
    assert ((test[:100] + towards) @ direction > test[100:] @ direction).float().mean() > least


def test_lda_works_from_one_bad_row_on_because_innocent_ones_say_how_states_vary():
    draw = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.2, 8, 16)  # the largest coordinates say nothing
    towards = torch.zeros(16)
    towards[0] = 1.0
    innocent, test = torch.randn(300, 16, generator=draw) * scale, torch.randn(200, 16, generator=draw) * scale
    wins = {}
    for method in ("lda", "mean_difference"):
        direction = fits.get(method).fit(torch.randn(1, 16, generator=draw) * scale + towards, innocent)
        wins[method] = float(((test[:100] + towards) @ direction > test[100:] @ direction).float().mean())
    assert wins["lda"] > 0.9 and wins["mean_difference"] < 0.7


def test_lda_is_the_whitened_difference():
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=draw).double()
    noise = torch.randn(20_000, 4, generator=draw).double() @ mix
    difference = torch.tensor([1.0, -1, 0.5, 0]).double()
    direction = fits.get("lda").fit(noise[:10_000] + difference, noise[10_000:])
    expected = torch.linalg.solve(mix.T @ mix, difference).float()
    assert torch.cosine_similarity(direction, expected, dim=0) > 0.995


def test_a_threshold_flags_at_most_the_share_that_it_states():
    draw = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        scores = draw.standard_cauchy(120)
        threshold = choose_threshold(scores[:99].tolist(), 0.05)
        rates.append((scores[99:] > threshold.value).mean())
    assert 0.035 < np.mean(rates) <= 0.052


def test_a_threshold_is_refused_where_the_rows_cannot_resolve_it():
    with pytest.raises(
        MonitorError, match="200 innocent rows cannot resolve a false-positive rate of 0.001, 1 in 1000: 999"
    ):
        choose_threshold([0.0] * 200, 0.001)
    assert choose_threshold([*map(float, range(99))], 0.01).value == 98.0
    assert monitors.rows_needed(0.01) == 99
    with pytest.raises(MonitorError, match="between 0 and 1"):
        choose_threshold([0.0] * 200, 1.5)
    with pytest.raises(MonitorError, match="NaN"):
        choose_threshold([float("nan")] * 200, 0.1)


def saved(folder):
    monitor = replace(
        made(name="rolling_mean", window=3),
        threshold=choose_threshold([*map(float, range(30))], 0.1),
        calibration=monitors.calibrate([0.0, 1.0, 2.0, 3.0], [False, False, True, True]),
    )
    return monitors.save(monitor, folder / "monitor"), monitor


def test_a_saved_monitor_is_the_same(tmp_path):
    folder, monitor = saved(tmp_path)
    model = steered(layers=1)  # beside a steering vector
    loaded = monitors.load(folder, model, tokenizer())
    assert torch.equal(loaded.weight, monitor.weight)
    assert replace(loaded, weight=monitor.weight, tokenizer=monitor.tokenizer) == monitor
    assert monitors.row_scores(loaded, model, [batch()]) == monitors.row_scores(monitor, model, [batch()])
    assert {file.name for file in folder.iterdir()} == {"monitor.json", "monitor.safetensors"}


def test_a_monitor_is_refused_on_what_it_was_not_made_for(tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(MonitorError, match="monitor of another base model"):
        monitors.load(folder, tiny(seed=1), tokenizer())
    with pytest.raises(MonitorError, match="num_layers is 6"):
        monitors.load(folder, tiny(num_hidden_layers=6), tokenizer())
    with pytest.raises(MonitorError, match="monitor of layer 2, not of layer 1"):
        monitors.load(folder, tiny(), tokenizer(), layer=1)
    with pytest.raises(MonitorError, match="monitor of site block, not of site mlp"):
        monitors.load(folder, tiny(), tokenizer(), site="mlp")
    other = tokenizer()
    other.add_tokens(["extra"])
    with pytest.raises(MonitorError, match="another tokenizer: the vocabulary"):
        monitors.load(folder, tiny(), other)
    with pytest.raises(MonitorError, match="the chat template"):
        monitors.load(folder, tiny(), tokenizer(template="{{ messages }}"))


@pytest.mark.parametrize("change", [{"layer": 1}, {"bias": 0.5}, {"pooling": {"name": "max"}}, {"threshold": None}])
def test_a_changed_file_is_refused(tmp_path, change):
    folder, _ = saved(tmp_path)
    file = folder / "monitor.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(MonitorError, match="changed after it was saved"):
        monitors.load(folder, tiny(), tokenizer())


def test_changed_weights_are_refused(tmp_path):
    folder, monitor = saved(tmp_path)
    save_file({f"{monitor.module}.monitor.weight": monitor.weight * 2}, folder / "monitor.safetensors")
    with pytest.raises(MonitorError, match="damaged"):
        monitors.read(folder)
    (folder / "monitor.safetensors").unlink()
    with pytest.raises(MonitorError, match="is not a monitor"):
        monitors.read(folder)


def test_saving_writes_over_monitors_alone(tmp_path):
    folder, monitor = saved(tmp_path)
    monitors.save(monitor, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(MonitorError, match="something other than a monitor"):
        monitors.save(monitor, folder)


def test_calibration_moves_with_the_share_of_bad_rows():
    calibration = monitors.Calibration(slope=1.0, intercept=0.0, share=0.5)
    assert calibration(0.0) == pytest.approx(0.5)
    assert calibration(0.0, share=0.02) == pytest.approx(0.02)
    assert monitors.calibrate([1.0, 2.0], [False, False]) is None


def test_what_cannot_be_fitted():
    with pytest.raises(MonitorError, match="got 0 and 3"):
        monitors.fit_direction("lda", torch.zeros(0, 4), torch.ones(3, 4))
    with pytest.raises(MonitorError, match="other than zero"):
        monitors.make_monitor(
            "mean_difference", pooling.get("mean"), tiny(), tokenizer(), 1, (torch.ones(2, 32), torch.ones(3, 32))
        )
    with pytest.raises(ValueError, match="no token to read"):
        given = batch()
        monitors.pooled_states(tiny(), [{**given, "labels": torch.full_like(given["labels"], -100)}])
    with pytest.raises(ValueError, match="width 32"):
        [*monitors.token_scores([made()], tiny(hidden_size=48), [batch()])]
