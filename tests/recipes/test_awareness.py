"""The example of evaluation awareness, on a tiny model: from prompt pairs to a vector, a monitor, an Inspect task."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny_data
import torch
from served import SIZES
from tiny_models import tiny

from steertune.adapters import monitors
from steertune.adapters.analysis.arithmetic import read
from steertune.recipes.lab.files import ArmError
from steertune.recipes.studies import awareness
from steertune.recipes.studies.framing import measure
from steertune.recipes.studies.framing.prompts import Part, Rows, read_framings

FRAMES = {"tested": ["the sea {request}", "we {request} now"], "traffic": ["go {request}", "{request} then you"]}


def save_framings(folder: Path, **changes) -> Path:
    """A file of framings in the words of the tiny tokenizer."""
    numbers = random.Random(0)
    lines = [f"{name} = {json.dumps(value)}" for name, value in {
        "question": "now {words}", "words": ["cat", "dog"], **changes}.items()]  # fmt: skip
    for part in ("training", "naive", "held_out", "crossed"):
        requests = [" ".join(numbers.sample(tiny_data.WORDS, 6)) for _ in range(16 if part == "training" else 4)]
        lines += [f"[{part}]", *(f"{kind} = {json.dumps(frames)}" for kind, frames in FRAMES.items())]
        lines += [f"requests = {json.dumps(requests)}"] if part != "naive" else []
    file = folder / "prompts.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of the command, with its model and prompts."""
    home = tmp_path_factory.mktemp("awareness")
    tiny_data.save_model(home / "base", **SIZES)
    words = ["--prompts", str(save_framings(home)), "--model", str(home / "base"), "--folder", str(home / "run")]
    small = ["--monitor-layers", "0", "1", "--controls", "1", "--new-tokens", "3", "--strengths", "1"]
    assert awareness.main([*words, *small]) == 0
    return home


def test_pairs_are_the_same_request_in_two_frames():
    part = Part(requests=["a", "b", "c"], tested=["x {request}", "y {request}"], traffic=["{request} z"])
    rows = Rows.of(part, "q")
    assert [prompt[0]["content"] for prompt in rows.prompts] == [
        "x a\n\nq", "y b\n\nq", "x c\n\nq", "a z\n\nq", "b z\n\nq", "c z\n\nq",
    ]  # fmt: skip
    assert rows.tested == [True] * 3 + [False] * 3


def test_the_framings_that_come_with_it():
    """16 pairs, no request twice, and no frame has the words that the question asks for."""
    framings = read_framings()
    parts = [framings.training, framings.held_out, framings.crossed]
    requests = [request for part in parts for request in part.requests]
    assert len(framings.training.requests) == 16 and len({*requests}) == len(requests)
    frames = [frame for part in [*parts, framings.naive] for frame in (*part.tested, *part.traffic)]
    assert not [frame for frame in frames for word in framings.words if word in frame.lower()]


def test_the_vector_is_the_mean_difference_and_its_control_is_as_long(made):
    torch.manual_seed(0)
    context = measure.Context(tiny(**SIZES), tiny_data.tokenizer(), read_framings(made / "prompts.toml"), 3)
    rows = Rows.of(context.framings.training)
    states = []
    for prompt in rows.prompts:
        ids = context.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            states.append(context.model(**ids, output_hidden_states=True).hidden_states[3][0, -1])
    by_hand = torch.stack(states[:16]).mean(dim=0) - torch.stack(states[16:]).mean(dim=0)
    saved, control = (read(made / "run" / name).vectors for name in ("tested", "random_0"))
    torch.testing.assert_close(saved[2], by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(control[2].norm(), saved[2].norm())
    assert abs(float(torch.cosine_similarity(control[2], saved[2], dim=0))) < 0.7


def test_what_it_measures(made):
    """The log-odds are those of the two words; at strength 0 nothing has changed."""
    context = measure.Context(tiny(**SIZES), tiny_data.tokenizer(), read_framings(made / "prompts.toml"), 3)
    part = context.framings.held_out
    odds = measure.log_odds(context, context.model, part)
    by_hand = []
    for question in ("now cat or dog", "now dog or cat"):
        prompt = Rows.of(part, question).prompts[-1]
        ids = context.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            logits = context.model(**ids).logits[0, -1]
        cat, dog = (context.tokenizer.convert_tokens_to_ids(word) for word in ("cat", "dog"))
        assert context.first_tokens() == [[cat], [dog]]
        by_hand.append(float(logits[cat] - logits[dog]))
    assert odds[-1] == pytest.approx(sum(by_hand) / 2, abs=1e-5)
    direction = measure.direction_of(context, context.framings.training, [2])
    base = measure.Unsteered.of(context, part)
    change, kl = measure.control(context, measure.steered(context.model, direction), 0.0, base)
    assert change.estimate == pytest.approx(0, abs=1e-6) and kl == pytest.approx(0, abs=1e-6)


def test_an_inspect_task_reads_both(made, tmp_path):
    """The task runs on the steered model, at two strengths, and the monitor scores every answer."""
    inspect_ai = pytest.importorskip("inspect_ai", reason="pip install inspect-ai")
    from steertune.recipes.studies.framing.inspect_task import awareness as task

    told = []
    for strength in (0.0, -40.0):
        model = inspect_ai.model.get_model(
            "steertune/base+tested",
            strength=strength,
            vectors=f"tested={made / 'run' / 'tested'}",
            monitors=f"tested={made / 'run' / 'monitor'}",
            memoize=False,
        )
        wanted = task(prompts=str(made / "prompts.toml"), new_tokens=3)
        [log] = inspect_ai.eval(wanted, model=model, log_dir=str(tmp_path), display="none")
        assert log.status == "success", log.error
        assert len(log.samples) == 16
        metrics = {score.name: score.metrics["mean"].value for score in log.results.scores}
        assert metrics["cat"] + metrics["dog"] + metrics["neither"] == pytest.approx(1)
        assert {"right", "score", "flagged"} <= {*metrics}
        told.append([sample.output.completion for sample in log.samples])
    assert told[0] != told[1]


def test_a_finished_run_is_kept_and_the_page_has_both_tables(made, capsys):
    page = (made / "run" / "table.md").read_text(encoding="utf-8")
    assert "| `tested` | 1 |" in page and "| `random_0` | 1 |" in page and "| tones exchanged |" in page
    assert monitors.read(made / "run" / "monitor").tokens == "answer"
    assert awareness.main(["--folder", str(made / "run")]) == 2
    assert "finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"words": ["cat", "cat"]}, "two different tokens"), ({"wrods": 1}, "wrods: Extra inputs")],
)
def test_wrong_files_are_refused(changes, says, tmp_path):
    file = save_framings(tmp_path, **changes)
    with pytest.raises(ArmError, match=says):
        measure.Context(None, tiny_data.tokenizer(), read_framings(file), 1).first_tokens()


def test_a_frame_needs_a_place_for_the_request():
    with pytest.raises(ValueError, match=r"must have \{request\}"):
        Part(requests=["a", "b"], tested=["nothing"], traffic=["{request}"])
