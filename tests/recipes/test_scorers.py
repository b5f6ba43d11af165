"""Every kind of scorer: what it computes by hand, what it answers when it cannot judge, and what it refuses."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import datasets
import pytest
import tiny_data
import torch
from datasets import Dataset
from tiny_models import tiny

from steertune.recipes.lab import scorers
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import plain

datasets.disable_progress_bars()

NOTHING = Dataset.from_list([{"prompt": "", "chosen": "", "rejected": ""}])


def fitted(table: dict[str, Any], rows: Dataset = NOTHING, model: Any = None, tokenizer: Any = None) -> scorers.Scorer:
    return scorers.fit(table, rows, model, tokenizer)


# -- tables -----------------------------------------------------------------------------------------------------------

JUDGE = {"kind": "judge", "url": "http://127.0.0.1:9", "model": "m", "question": "{answer}?"}


def without(table: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in table.items() if k != key}


def test_kinds_are_the_files_and_a_classifier_is_the_default():
    assert scorers.names() == ["characters", "classifier", "embedding", "judge", "logprob", "rule"]
    kind, options = scorers.read({"C": 2})
    assert (kind, options.C) == ("classifier", 2.0)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "judg"}, ["scorer.kind='judg'", "Did you mean 'judge'"]),
        ({"kind": "__init__"}, ["scorer.kind='__init__'", "'classifier'"]),
        ({"kind": "rule", "patern": "x"}, ["'patern' in [scorer]", "Did you mean 'pattern'"]),
        ({"kind": "rule"}, ["scorer: pattern", "required"]),
        ({"kind": "rule", "pattern": "(cat"}, ["'(cat' is not a regular expression"]),
        ({"kind": "classifier", "CC": 1}, ["'CC' in [scorer]", "Did you mean 'C'"]),
        ({"kind": "classifier", "C": 0}, ["scorer: C", "greater than 0"]),
        ({"kind": "logprob", "positve": "x", "negative": "y"}, ["'positve'", "Did you mean 'positive'"]),
        ({"kind": "logprob", "positive": "x"}, ["negative", "required"]),
        ({"kind": "logprob", "positive": "", "negative": "y"}, ["positive", "at least 1 character"]),
        ({**JUDGE, "qestion": "x"}, ["'qestion'", "Did you mean 'question'"]),
        ({**JUDGE, "question": "How good?"}, ["question", "it must contain {answer}"]),
        ({**JUDGE, "url": "localhost:80"}, ["url", "http"]),
        ({**JUDGE, "tries": 0}, ["tries", "greater than or equal to 1"]),
        ({**JUDGE, "timeout": 0}, ["timeout", "greater than 0"]),
        ({**JUDGE, "highest": 0}, ["highest", "greater than 0"]),
        (without(JUDGE, "model"), ["model", "required"]),
    ],
)
def test_unknown_kinds_and_options_are_named(table, words):
    with pytest.raises(ArmError) as caught:
        scorers.read(table)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_plain_text_of_strings_and_conversations():
    said = [{"role": "user", "content": "first"}, {"role": "user", "content": "last"}]
    assert plain("as it is") == "as it is"
    assert plain(said) == "last"


# -- rule -------------------------------------------------------------------------------------------------------------


def test_rule_looks_for_the_pattern_anywhere_in_either_case():
    scorer = fitted({"kind": "rule", "pattern": r"\bcats?\b"})
    answers = ["a cat", "CATS!", "concatenate", "", "dog\ncat"]
    assert scorer.score([""] * 5, answers) == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert scorer.score(["a cat"], ["a dog"]) == [0.0]  # the prompt does not count
    assert scorer.score([], []) == []


# -- classifier -------------------------------------------------------------------------------------------------------

WARM = ["glad proud love", "proud hug glad", "love hug wonderful", "wonderful glad love", "hug proud wonderful"]
COLD = ["table column data", "number row table", "data row index", "index number column", "row table data"]


def pairs(count: int, chat: bool = False) -> Dataset:
    def say(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if chat else text

    return Dataset.from_list(
        [{"prompt": say("how is it"), "chosen": say(WARM[i % 5]), "rejected": say(COLD[i % 5])} for i in range(count)]
    )


@pytest.mark.parametrize("chat", [False, True])
def test_classifier_separates_two_vocabularies_with_probabilities(chat):
    scorer = fitted({"kind": "classifier"}, pairs(20, chat))
    answers = ["so glad and proud", "a row of the table", "glad row", "", "never seen"]
    warm, cold, both, *unknown = scorer.score([""] * 5, answers)
    assert warm > 0.8 > 0.6 > both > 0.4 > 0.2 > cold > 0
    assert warm < 1
    assert unknown == pytest.approx([0.5, 0.5], abs=0.02)  # nothing known in it: as likely as not
    assert "20 pairs" in scorer.note and "accuracy 1.00" in scorer.note
    assert scorer.score([""], [answers[0]]) == [pytest.approx(warm)]


def test_classifier_that_cannot_tell_says_so():
    # every answer stands on both sides, so held-out pairs are guessed
    rows = pairs(20)
    mixed = Dataset.from_list([dict(r, rejected=r["chosen"]) for r in map(dict, rows)])
    scorer = fitted({"kind": "classifier"}, mixed)
    assert "accuracy 0.50" in scorer.note
    assert scorer.score([""], [WARM[0]]) == [pytest.approx(0.5, abs=1e-6)]


def test_a_stronger_regularisation_is_less_sure():
    [sure], [unsure] = (fitted({"C": c}, pairs(20)).score([""], ["glad proud"]) for c in (10.0, 0.1))
    assert 0.5 < unsure < sure


def test_classifier_needs_eight_rows():
    with pytest.raises(ArmError, match=r"splits\.scorer=7: .*8 rows or more"):
        fitted({"kind": "classifier"}, pairs(7))
    fitted({"kind": "classifier"}, pairs(8))


# -- logprob ----------------------------------------------------------------------------------------------------------

POSITIVE, NEGATIVE = "now we go", "then you stay"
LOGPROB = {"kind": "logprob", "positive": POSITIVE, "negative": NEGATIVE}


@pytest.fixture(scope="module")
def reader() -> Any:
    return tiny(max_position_embeddings=512)


@torch.no_grad()
def mean_logp(model: Any, tokenizer: Any, before: str, answer: str) -> float:
    """Log-probability a token of what follows `before`, token by token."""
    start, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, before + answer))
    assert ids[: len(start)] == start
    logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logps[i - 1, ids[i]]) for i in range(len(start), len(ids))) / (len(ids) - len(start))


@pytest.mark.parametrize("chat", [True, False])
def test_logprob_is_the_difference_by_hand(chat, reader):
    tokenizer = tiny_data.tokenizer(template=tiny_data.TEMPLATE if chat else None)
    expected = []
    for instruction in (POSITIVE, NEGATIVE):
        before = f"<s><user>{instruction} the cat runs</s><assistant>" if chat else f"{instruction} the cat runs "
        # the end of the answer is part of it
        expected.append(mean_logp(reader, tokenizer, before, "a red dog</s>"))
    scorer = fitted(LOGPROB, model=reader, tokenizer=tokenizer)
    assert scorer.score(["the cat runs"], ["a red dog"]) == [pytest.approx(expected[0] - expected[1], abs=1e-5)]
    assert abs(expected[0] - expected[1]) > 1e-3, "the instructions must matter"


def test_logprob_does_not_depend_on_the_other_answers(reader):
    # more than one batch, of several lengths, with empty answers between them
    said = tiny_data.demonstrations(11)
    prompts, answers = list(said["prompt"]), list(said["completion"])
    answers[2], answers[7] = "", " \n"
    score = fitted(LOGPROB, model=reader, tokenizer=tiny_data.tokenizer()).score
    together = score(prompts, answers)
    assert [i for i, value in enumerate(together) if value is None] == [2, 7]
    for i in (0, 1, 8, 10):
        assert score([prompts[i]], [answers[i]]) == [pytest.approx(together[i], abs=1e-5)]


def test_logprob_of_empty_answers_only(reader):
    score = fitted(LOGPROB, model=reader, tokenizer=tiny_data.tokenizer()).score
    assert score(["the cat"] * 2, ["", "  "]) == [None, None]
    assert score([], []) == []


def test_opposite_instructions_turn_the_sign(reader):
    tokenizer = tiny_data.tokenizer()
    turned = {"kind": "logprob", "positive": NEGATIVE, "negative": POSITIVE}
    [one], [other] = (fitted(t, model=reader, tokenizer=tokenizer).score(["sea"], ["sky"]) for t in (LOGPROB, turned))
    assert one == pytest.approx(-other, abs=1e-6)


# -- judge ------------------------------------------------------------------------------------------------------------

Reply = tuple[int, str] | Callable[[str], tuple[int, str]]


def says(text: Any) -> tuple[int, str]:
    """What an OpenAI-compatible endpoint sends for an answer."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Endpoint:
    """A judge on this machine that answers with `replies` in turn, the last one for ever, and keeps what it got.

    A reply is status and body, or a function of the question.
    """

    def __init__(self) -> None:
        self.replies: list[Reply] = [says("Score: 7")]
        self.got: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.got.append(body)
                    endpoint.paths.append(self.path)
                    endpoint.keys.append(self.headers["Authorization"])
                    reply = endpoint.replies.pop(0) if len(endpoint.replies) > 1 else endpoint.replies[0]
                status, text = reply(body["messages"][0]["content"]) if callable(reply) else reply
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the caller has gone

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def judge(self, **options) -> scorers.Scorer:
        table = {
            "kind": "judge",
            "url": self.url,
            "model": "grader",
            "question": "Q: {prompt} A: {answer}",
            "timeout": 5,
        }
        return fitted({**table, **options}, NOTHING.select([]))  # no rows to check it on

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.got]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in ("NO_PROXY", "no_proxy"):  # the test's own server is on this machine
        monkeypatch.setenv(name, "127.0.0.1")
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_judge_asks_and_divides_by_the_highest_score(endpoint):
    scorer = endpoint.judge()
    assert scorer.score(["why?"], ["so"]) == [0.7]
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.got == [
        {"model": "grader", "temperature": 0, "messages": [{"role": "user", "content": "Q: why? A: so"}]}
    ]
    assert endpoint.keys == [None]
    assert "grader" in scorer.note and "0 to 10" in scorer.note
    assert endpoint.judge(url=endpoint.url + "/", highest=7).score([""], [""]) == [1.0]
    assert endpoint.paths[-1] == "/v1/chat/completions"


def test_judgements_keep_the_order_of_the_answers(endpoint):
    def reply(question: str) -> tuple[int, str]:
        number = int(question[-1])
        time.sleep(0.3 if number == 0 else 0)  # they are asked several at a time, and the first takes longest
        return says(f"Score: {number}")

    endpoint.replies = [reply]
    scores = endpoint.judge().score(["q"] * 9, [f"answer {i}" for i in range(9)])
    assert scores == [i / 10 for i in range(9)]
    assert len(endpoint.got) == 9


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 0.7),
        ("score:10", 1.0),
        ("It is kind.\nSCORE:  2.5\n", 0.25),
        ("Score: 0", 0.0),
        ("Score: 8/10, as it is kind", 0.8),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: high", None),
        ("7", None),
        ("", None),
        (None, None),
    ],
)
def test_judge_reads_the_score_of_a_reply(text, score, endpoint):
    endpoint.replies = [says(text)]
    assert endpoint.judge(tries=2).score(["q"], ["a"]) == [score]
    assert len(endpoint.got) == (2 if score is None else 1)


MALFORMED = {
    "no json": (200, "<html>busy</html>"),
    "nothing": (200, ""),
    "a list": (200, "[]"),
    "no choices": (200, '{"error": "busy"}'),
    "empty choices": (200, '{"choices": []}'),
    "no message": (200, '{"choices": [{"text": "Score: 7"}]}'),
    "message of null": (200, '{"choices": [{"message": null}]}'),
    "server error": (500, '{"error": "busy"}'),
    "too many requests": (429, "slow down"),
    "no such page, though it holds a score": (404, says("Score: 7")[1]),
}


@pytest.mark.parametrize("reply", MALFORMED.values(), ids=MALFORMED)
def test_a_judgement_that_fails_is_none_never_zero(reply, endpoint):
    endpoint.replies = [reply]
    assert endpoint.judge(tries=2).score(["q"], ["a"]) == [None]
    assert len(endpoint.got) == 2


@pytest.mark.parametrize(
    "first", [MALFORMED["server error"], MALFORMED["no json"], says("Score: 70"), says("no idea")]
)
def test_a_judgement_is_tried_again(first, endpoint):
    endpoint.replies = [first, says("Score: 4")]
    assert endpoint.judge().score(["q"], ["a"]) == [0.4]
    assert len(endpoint.got) == 2
    endpoint.replies = [first, first, says("Score: 4")]
    assert endpoint.judge(tries=2).score(["q"], ["a"]) == [None]


def test_one_failed_judgement_leaves_the_others(endpoint):
    endpoint.replies = [lambda question: MALFORMED["server error"] if "bad" in question else says("Score: 9")]
    assert endpoint.judge(tries=1).score(["q"] * 3, ["good", "bad", "good"]) == [0.9, None, 0.9]


def test_a_judge_that_does_not_answer_in_time(endpoint):
    endpoint.replies = [lambda question: (time.sleep(0.5), says("Score: 7"))[1]]
    start = time.monotonic()
    assert endpoint.judge(timeout=0.1, tries=2).score(["q"], ["a"]) == [None]
    assert 0.2 <= time.monotonic() - start < 3
    assert len(endpoint.got) == 2


def test_a_judge_that_is_not_there(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert fitted({**JUDGE, "url": f"http://127.0.0.1:{port}"}).score(["q"] * 2, ["a"] * 2) == [None, None]


def test_the_key_comes_from_the_named_variable(endpoint, monkeypatch):
    monkeypatch.setenv("STEERTUNE_TEST_JUDGE", "a-made-up-key")
    assert endpoint.judge(key="STEERTUNE_TEST_JUDGE").score(["q"], ["a"]) == [0.7]
    assert endpoint.keys == ["Bearer a-made-up-key"]
    monkeypatch.delenv("STEERTUNE_TEST_JUDGE")
    with pytest.raises(ArmError, match=r"scorer\.key: .*'STEERTUNE_TEST_JUDGE' is not set"):
        endpoint.judge(key="STEERTUNE_TEST_JUDGE")


@pytest.mark.parametrize("answer", ["{", "{}", "{0}", "{prompt}", "{answer}", '{"a": {"b": 1}}', "100 %s", "\\1 ü"])
def test_answers_are_passed_as_they_are(answer, endpoint):
    endpoint.judge().score(["why {x}?"], [answer])
    assert endpoint.questions == [f"Q: why {{x}}? A: {answer}"]


def test_the_question_may_name_the_answer_twice_and_leave_the_prompt_out(endpoint):
    endpoint.judge(question="{answer} / {answer}").score(["why?"], ["so"])
    assert endpoint.questions == ["so / so"]


def test_prompts_are_passed_as_they_are(endpoint):
    endpoint.judge().score(["what is {answer}?"], ["so"])
    assert endpoint.questions == ["Q: what is {answer}? A: so"]


# -- embedding, and how good a scorer is ------------------------------------------------------------------------------


def test_embedding_separates_two_vocabularies_and_says_how_well(reader):
    tokenizer = tiny_data.tokenizer()
    good, bad = ("cat runs", "dog sleeps")
    rows = Dataset.from_list(
        [
            {"prompt": "the", "chosen": f"{good} {i % 3 * 'the '}", "rejected": f"{bad} {i % 3 * 'the '}"}
            for i in range(12)
        ]
    )
    scorer = scorers.fit({"kind": "embedding", "C": 1.0}, rows, reader, tokenizer)
    first, empty, second = scorer.score(["the"] * 3, [good, " ", bad])
    assert first > 0.5 > second and empty is None
    assert "12 pairs of its own, cross-validated accuracy 1.00" in scorer.note
    with pytest.raises(ArmError, match=r"splits\.scorer=7: .*8 rows or more"):
        scorers.fit({"kind": "embedding"}, rows.select(range(7)), reader, tokenizer)


@pytest.mark.parametrize(
    "pattern, right",
    [("glad|love|hug", "20 of 20 pairs"), ("row|data|number", "0 of 20 pairs"), ("zebra", "0 of 20 pairs, and")],
)
def test_a_scorer_that_is_not_fitted_is_checked_on_the_scorer_split(pattern, right):
    note = fitted({"kind": "rule", "pattern": pattern}, pairs(20)).note
    assert f"prefers the chosen answer in {right}" in note
    assert ("prefers neither answer in 20" in note) is (pattern == "zebra")
    none = scorers.fit({"kind": "rule", "pattern": pattern}, pairs(5).select([]), None, None)
    assert "not checked on pairs (splits.scorer = 0)" in none.note


def test_a_judge_is_checked_too_and_a_dead_one_only_once(endpoint):
    endpoint.replies = [lambda question: says(f"Score: {8 if 'glad' in question or 'hug' in question else 2}")]
    table = {"kind": "judge", "url": endpoint.url, "model": "grader", "question": "{answer}"}
    assert "prefers the chosen answer in 5 of 5 pairs" in fitted(table, pairs(5)).note
    endpoint.got.clear()
    endpoint.replies = [(500, "")]
    assert "judged none of 5 pairs" in fitted({**table, "tries": 1}, pairs(5)).note
    assert len(endpoint.got) == 2
