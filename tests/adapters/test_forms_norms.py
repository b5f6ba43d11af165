"""Forms and norms against slow per-token formulas, their starting points and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from tiny_models import steered, tiny, tokens, vector_of

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.adapters.forms import change, null
from steertune.adapters.norms import cap, preserve, write_vector

LAYER, WIDTH = 1, 32
FORMS = ["bias", "gated", "linear", "low_rank"]
NORMS = {
    "free": {},
    "fixed": {"norm_value": 2.0, "init": "random"},
    "capped": {"norm_value": 2.0},
    "relative": {"norm_value": 0.5, "init": "random", "residual_norms": {str(LAYER): 4.0}},
    "preserve": {},
}
PAIRS = [(f, n) for f in FORMS for n in NORMS if (f, n) not in (("low_rank", "fixed"), ("low_rank", "relative"))]


def reference(form: str, norm: str, h: list[float], v, w, b, strength: float = 1.0, value: float = 0.0) -> list[float]:
    """One token, in plain Python: `v` and `w` are lists of rows, `b` a list."""

    def length(x):
        return math.sqrt(sum(x_i * x_i for x_i in x))

    if norm in ("fixed", "relative"):
        v = [[x * value / length(row) for x in row] for row in v]
    gates = []
    for row in range(len(v)):
        gate = 1.0 if form == "bias" else sum(x * y for x, y in zip(w[row], h, strict=True)) + b[row]
        gates.append(max(gate, 0.0) if form == "gated" else gate)
    delta = [sum(gate * row[i] for gate, row in zip(gates, v, strict=True)) for i in range(len(h))]
    if norm == "capped" and length(delta) > value:
        delta = [x * value / length(delta) for x in delta]
    out = [x + strength * y for x, y in zip(h, delta, strict=True)]
    return [x * length(h) / length(out) for x in out] if norm == "preserve" else out


def captured(model, ids) -> torch.Tensor:
    return model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1]


def parameter(model, kind: str) -> torch.Tensor:
    return next(p for n, p in model.named_parameters() if f"steering_vector_{kind}." in n)


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, -1.5])
@pytest.mark.parametrize("form, norm", PAIRS)
def test_every_form_and_norm_is_its_formula(form, norm, strength):
    rank = 3 if form == "low_rank" else 1
    ids = tokens()
    before = captured(tiny(), ids)
    model = steered(layers=LAYER, form=form, norm=norm, rank=rank, **NORMS[norm])
    v = vector_of(model).reshape(rank, WIDTH).tolist()
    w, b = (None, None) if form == "bias" else (parameter(model, "w").reshape(rank, WIDTH), parameter(model, "b"))
    w, b = (None, None) if w is None else (w.tolist(), b.tolist())
    with set_strength(model, strength):
        after = captured(model, ids)
    expected = torch.tensor(
        [[reference(form, norm, h, v, w, b, strength, value=2.0) for h in row] for row in before.tolist()]
    )
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_null_by_hand():
    hidden = torch.tensor([[[3.0, 4.0], [-3.0, 4.0]]])
    assert (hidden + null(hidden, torch.tensor([2.0, 0.0]))).tolist() == [[[0.0, 4.0], [-3.0, 4.0]]]
    assert not null(hidden, torch.zeros(2)).any(), "there is no direction yet"


@torch.no_grad()
def test_null_strength_takes_the_direction_out_of_the_residual_stream():
    model, ids = steered(layers=LAYER), tokens(4, 16)
    before = captured(tiny(), ids)
    with set_strength(model, "null"):
        after = captured(model, ids)
    along = vector_of(model) / vector_of(model).norm()
    was, is_now = before @ along, after @ along
    assert (was > 0).any() and (was < 0).any()
    torch.testing.assert_close(is_now, was.clamp_max(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        after - is_now[..., None] * along, before - was[..., None] * along, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(captured(model, ids), captured(steered(layers=LAYER), ids)), "afterwards it is as before"


@torch.no_grad()
@pytest.mark.parametrize("init_scale", [1.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_starts_as_the_bias_form(form, init_scale):
    rank = 3 if form == "low_rank" else 1
    ids = tokens()
    config = SteeringVectorConfig(layers=LAYER, form=form, rank=rank, init="random", init_scale=init_scale)
    torch.manual_seed(5)
    model = get_peft_model(tiny(), config).eval()
    v = vector_of(model).reshape(rank, WIDTH)
    assert v[0].norm().item() == pytest.approx(init_scale, rel=1e-5)
    assert not v[1:].any()
    torch.testing.assert_close(captured(model, ids), captured(tiny(), ids) + v[0], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("form", ["gated", "linear", "low_rank"])
def test_forms_stay_fp32_under_autocast(form):
    """Mixed precision rounds matrix products; at the start of training a form would not be the bias form."""
    v, hidden = torch.randn(WIDTH), torch.randn(1, 3, WIDTH).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        delta = change(form, hidden, v, torch.zeros(WIDTH), torch.ones(1))
    assert torch.equal(delta, v.expand(1, 3, WIDTH))


@torch.no_grad()
def test_relative_length_is_a_share_of_the_residual_norm():
    written = write_vector("relative", torch.randn(WIDTH), 0.5, residual_norm=8.0)
    assert written.norm().item() == pytest.approx(4.0, rel=1e-5)


def test_relative_without_residual_norms_is_an_error():
    model = steered(layers=LAYER, norm="relative", norm_value=0.5, init="random")
    with pytest.raises(ValueError, match=r"mean residual norm of layer 1.*set residual_norms"):
        model(input_ids=tokens())


def test_capped_leaves_short_changes_alone():
    short, long = torch.tensor([0.3, 0.4]), torch.tensor([3.0, 4.0])
    assert torch.equal(cap(short, 1.0), short)
    torch.testing.assert_close(cap(long, 1.0), torch.tensor([0.6, 0.8]))


def test_preserve_keeps_every_length():
    hidden = torch.randn(2, 3, WIDTH)
    kept = preserve(hidden + torch.randn(WIDTH), hidden)
    torch.testing.assert_close(kept.norm(dim=-1), hidden.norm(dim=-1))


@pytest.mark.parametrize("norm", ["free", "capped", "preserve"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_from_a_zero_start_are_finite_and_move_the_vector(form, norm):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=LAYER, form=form, norm=norm, **NORMS[norm]))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for kind in model.peft_config["default"].parameter_names:
        assert torch.isfinite(parameter(model, kind).grad).all()
    assert parameter(model, "v").grad.norm() > 0


@pytest.mark.parametrize("form, norm", PAIRS)
def test_gradients_match_finite_differences(form, norm):
    """A derivative along a random direction of all parameters, in a base model of 64-bit numbers."""
    rank = 3 if form == "low_rank" else 1
    model = steered(tiny().double(), layers=LAYER, form=form, norm=norm, rank=rank, stream_sizes={}, **NORMS[norm])
    kinds = model.peft_config["default"].parameter_names
    for kind in kinds:
        parameter(model, kind).data = parameter(model, kind).data.double()
    weights = torch.randn(WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(3))

    def objective() -> torch.Tensor:
        return (torch.tanh(captured(model, tokens())) @ weights).sum()

    objective().backward()
    directions = {kind: torch.randn_like(parameter(model, kind)) for kind in kinds}
    exact = sum(float((parameter(model, kind).grad * directions[kind]).sum()) for kind in kinds)
    values, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            for kind in kinds:
                parameter(model, kind).add_(sign * step * directions[kind])
            values.append(float(objective()))
            for kind in kinds:
                parameter(model, kind).sub_(sign * step * directions[kind])
    assert exact == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("form", ["bias", "gated"])
def test_tied_layers_share_one_vector_and_add_their_gradients(form):
    ids = tokens()
    tied = steered(layers=[0, 2], tied=True, form=form, stream_sizes={})
    apart = steered(layers=[0, 2], form=form, stream_sizes={})
    for kind in tied.peft_config["default"].parameter_names:
        copies = [p for n, p in apart.named_parameters() if f"steering_vector_{kind}." in n]
        assert len(copies) == 2
        for copy in copies:
            copy.data = parameter(tied, kind).data.clone()
    assert len([p for p in tied.parameters() if p.requires_grad]) == len(tied.peft_config["default"].parameter_names)
    losses = [model(input_ids=ids, labels=ids).loss for model in (tied, apart)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for kind in tied.peft_config["default"].parameter_names:
        total = sum(p.grad for n, p in apart.named_parameters() if f"steering_vector_{kind}." in n)
        torch.testing.assert_close(parameter(tied, kind).grad, total)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_steering_parameters_learn(form):
    model = steered(layers=LAYER, form=form)
    trainable = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"steering_vector_{kind}" for kind in model.peft_config["default"].parameter_names}


def test_low_rank_rows_get_different_gradients():
    """Rows that started alike would stay alike: a rank of 3 in name only."""
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=LAYER, form="low_rank", rank=3))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradient = parameter(model, "v").grad
    assert torch.linalg.matrix_rank(gradient) == 3
