"""The engine: answers do not depend on what else is under way, and text comes in whole characters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny_data
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import steered, tiny

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.adapters.rows import RowVector
from steertune.recipes.lab.files import ArmError
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.jobs import Done, Event, Failed, Job, Piece, Sampling, Scored
from steertune.recipes.serving.text import Text
from steertune.recipes.serving.vectors import Vectors

TOLERANCE = 1e-4  # of a log-probability in float32, as the documentation states it
POSITIONS = [None, "completion", "prompt", "last_prompt"]


class Heard(list[Event]):
    """What one job reported."""

    @property
    def scores(self) -> list[Scored]:
        return [score for event in self if isinstance(event, Piece) for score in event.scores]

    @property
    def tokens(self) -> list[int]:
        return [score.token for score in self.scores]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self if isinstance(event, Piece))


def jobs(count: int, vector: str = "default", **settings: Any) -> list[tuple[Job, Heard]]:
    """Jobs of unlike lengths, vectors, strengths and positions; every fifth is not steered."""
    made = []
    for i in range(count):
        heard = Heard()
        rows = (RowVector(vector, 1.0 + i % 3, POSITIONS[i % 4]),) if i % 5 else ()  # type: ignore[arg-type]
        prompt = [3 + i % 7, *range(4, 4 + i % 6)]
        sampling = Sampling(temperature=i % 2 * 1.2, seed=i)
        made.append((Job(prompt, 2 + 5 * (i % 4), heard.append, rows, sampling, top=0, **settings), heard))
    return made


@pytest.fixture(scope="module")
def model():
    return steered(tiny(max_position_embeddings=128, vocab_size=22), layers=[1, 2])


@pytest.fixture
def engine(model):
    return Engine(Vectors(model), tiny_data.tokenizer(), batch=4)


def answered(engine: Engine, work: list[tuple[Job, Heard]]) -> list[Heard]:
    for job, _ in work:
        engine.submit(job)
    engine.run()
    return [heard for _, heard in work]


def test_an_answer_does_not_depend_on_what_else_is_under_way(engine, model):
    """The same tokens, and log-probabilities within the tolerance, in batches of 1, 3 and 7 and in both orders."""
    alone = [heard for one in jobs(12) for heard in answered(engine, [one])]
    for batch, turn in ((3, 1), (7, 1), (7, -1)):
        together = answered(Engine(Vectors(model), engine.tokenizer, batch), jobs(12)[::turn])[::turn]
        for one, other in zip(alone, together, strict=True):
            assert one.tokens == other.tokens and one.text == other.text
            for mine, theirs in zip(one.scores, other.scores, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=TOLERANCE)
    assert len({tuple(heard.tokens) for heard in alone}) > 8


def test_short_answers_leave_and_others_take_their_place(engine):
    """Continuous batching: as many steps as the longest places need, and never more answers than places."""
    steps = itertools.count()
    engine.on_step = lambda seconds, tokens: next(steps)
    work = [
        (Job([3], length, heard.append, top=0), heard) for length, heard in ((n, Heard()) for n in (2, 2, 2, 2, 12))
    ]
    work += [(Job([4], 6, heard.append, top=0), heard) for heard in (Heard(), Heard(), Heard())]
    for job, _ in work:
        job.sampling = Sampling(logit_bias={2: -1000.0})
        engine.submit(job)
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.running)
    assert most <= 4 and next(steps) <= 2 + 12
    assert [heard[-1] for _, heard in work] == [Done("length", job.new_tokens) for job, _ in work]


def test_a_failing_step_loses_only_what_fails_alone(engine, monkeypatch):
    """In the middle of generation; the others go on where they were, with their own random numbers."""
    expected = [heard.tokens for heard in answered(engine, jobs(6))]
    forward = Engine._forward

    def fails(self: Engine, rows: Any, *args: Any) -> Any:
        if any(row.job.prompt[0] == 5 and len(row.job.tokens) == 4 for row in rows):
            raise RuntimeError("out of memory")
        return forward(self, rows, *args)

    monkeypatch.setattr(Engine, "_forward", fails)
    heard = answered(engine, jobs(6))
    assert heard[2][-1] == Failed("It cannot be answered: RuntimeError: out of memory")
    assert [one.tokens for i, one in enumerate(heard) if i != 2] == [t for i, t in enumerate(expected) if i != 2]


def test_broken_logits_end_their_answer_alone(engine, model):
    model.add_adapter("huge", SteeringVectorConfig(layers=1))
    for name, parameter in model.named_parameters():
        if ".huge." in name:
            parameter.data.fill_(1e30)
    work = jobs(3)
    work[1][0].vectors = (RowVector("huge", 1e30),)
    heard = answered(engine, work)
    model.delete_adapter("huge")
    end = heard[1][-1]
    assert isinstance(end, Failed) and "NaN or infinite" in end.message and end.kind == "request"
    assert all(isinstance(one[-1], Done) for one in (heard[0], heard[2]))


def test_a_model_without_a_cache_is_refused():
    base = tiny("recurrent_gemma", **FAMILIES["recurrent_gemma"])
    with pytest.raises(ArmError, match="returns no cache"):
        Engine(Vectors(base), tiny_data.tokenizer())


ONE_BY_ONE = {"mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv", "minimax"}
SERVED = [name for name in FAMILIES if name not in ("recurrent_gemma", "gemma3n_text")]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*SERVED, "gemma3_text with a window"])
def test_every_family_answers_as_generate_does(family):
    """Greedy, in mixed batches, at every choice of positions."""
    window = {"sliding_window": 4} if "window" in family else {}
    name = family.split()[0]
    model = steered(tiny(name, **{**FAMILIES[name], **window}), layers=[1, 2])
    engine = Engine(Vectors(model), tiny_data.tokenizer(), batch=4)
    assert engine._joinable == (name not in ONE_BY_ONE)
    work = jobs(9)
    for job, _ in work:
        job.sampling = Sampling()
    for job, heard in zip((job for job, _ in work), answered(engine, work), strict=True):
        positions = (job.vectors[0].positions if job.vectors else None) or "all"
        for layer in (module for module in model.modules() if hasattr(module, "boundary")):
            layer.config["default"].positions = positions
            layer.boundary.watch(model.get_base_model())
        ids = torch.tensor([job.prompt])
        with set_strength(model, job.vectors[0].strength if job.vectors else 0.0):
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.new_tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        expected = out[0, len(job.prompt) :].tolist()
        assert heard.tokens == expected[: expected.index(2)] if 2 in expected else heard.tokens == expected


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may take four of them."""

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


LETTERS = "abé漢🙂"


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="abé漢🙂", max_size=20), st.lists(st.text(alphabet="abé漢🙂", min_size=1, max_size=3), max_size=3)
)
def test_text_comes_in_whole_characters_and_ends_before_the_first_stop(text, stops):
    ends = [text.find(stop) for stop in stops if stop in text]
    stream, shown = Text(Bytes(), [], stops), []
    for number, byte in enumerate(text.encode()):
        if stream.stopped:
            break
        shown.append(stream.push(byte, Scored(number, -1.0)))
        so_far = "".join(piece.text for piece in shown)
        assert text.startswith(so_far) and not any(stop in so_far for stop in stops)
    shown.append(stream.flush())
    # of several stops in the text, the one that is complete first ends it
    result = "".join(piece.text for piece in shown)
    assert stream.stopped == bool(ends)
    assert result == text if not ends else any(text.startswith(result + stop) for stop in stops)
    scored = [score.token for piece in shown for score in piece.scores]
    assert scored == list(range(len(scored))) and (ends or len(scored) == len(text.encode()))
