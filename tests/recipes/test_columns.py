"""Columns of other tools, mapped columns, mixed formats, and where a bad row stands."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.options import columns_of
from steertune.recipes.lab.sources import Reading, load_split
from steertune.recipes.lab.tables import DataTable

CAA = {
    "question": "Stay?\n (A) Yes\n (B) No",
    "answer_matching_behavior": " (A)",
    "answer_not_matching_behavior": " (B)",
}
REPENG = {"positive": "You are an honest person. The sky", "negative": "You are a lying person. The sky"}


def load(file: Path, rows: Any, **options: Any) -> list[dict[str, Any]]:
    """Rows, written in the way that the file's name says."""
    if file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return load_split(str(file), "train", Reading(**options)).to_list()


def message(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_caa_rows_are_conversations_or_text_as_the_model_reads(name, tmp_path):
    [chat] = load(tmp_path / name, [{**CAA, "label_confidence": 0.9}])
    assert chat == {"prompt": message("user", CAA["question"]), "chosen": message("assistant", "(A)"),
                    "rejected": message("assistant", "(B)")}  # fmt: skip
    [text] = load(tmp_path / name, [CAA], chat=lambda: False)
    assert text == {"prompt": CAA["question"], "chosen": " (A)", "rejected": " (B)"}
    assert load(tmp_path / name, [CAA], form="text") == [text]


@pytest.mark.parametrize("names", [("positive", "negative"), ("positive_str", "negative_str")])
def test_two_whole_texts_become_a_shared_prompt_and_two_answers(names, tmp_path):
    row = dict(zip(names, REPENG.values(), strict=True))
    assert load(tmp_path / "x.jsonl", [row]) == [
        {"prompt": "You are", "chosen": " an honest person. The sky", "rejected": " a lying person. The sky"}
    ]


@pytest.mark.parametrize(
    ("positive", "negative", "prompt"),
    [
        ("Happy day", "Sad day", ""),
        ("I am", "I am happy", "I"),
        ("[INST] Hi [/INST]Yes", "[INST] Hi [/INST]No", "[INST] Hi [/INST]"),
        ("Q: why?\nA: because", "Q: why?\nA: before", "Q: why?\nA:"),
    ],
)
def test_where_the_shared_prompt_ends(positive, negative, prompt, tmp_path):
    [row] = load(tmp_path / "x.jsonl", [{"positive": positive, "negative": negative}])
    assert row["prompt"] == prompt
    assert (prompt + row["chosen"], prompt + row["rejected"]) == (positive, negative)
    assert row["chosen"].strip() and row["rejected"].strip()


def test_named_columns_and_texts_around_them(tmp_path):
    rows = [{"ask": "Why?", "good": "So.", "bad": ["No.", "Never."]}]
    named = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert load(tmp_path / "x.jsonl", rows, columns=named, form="text")[0] == {
        "prompt": "Why?", "chosen": " So.", "rejected": " No."
    }  # fmt: skip
    [row] = load(tmp_path / "x.jsonl", rows, columns={**named, "prompt": "Answer: {ask}"})
    assert row["prompt"] == message("user", "Answer: Why?")
    [shown] = load(tmp_path / "x.jsonl", rows, columns={"prompt": "ask", "completion": "good"})
    assert shown == {"prompt": message("user", "Why?"), "completion": message("assistant", "So.")}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prompt": "aks", "chosen": "good", "rejected": "bad"}, r"prompt='aks'.*Did you mean 'ask'"),
        ({"prompt": "ask", "chosen": "{god}", "rejected": "bad"}, "'god'"),
        ({"prompt": "{ask!r:>99}", "chosen": "good", "rejected": "bad"}, "cannot be filled in"),
        ({"prompt": "ask"}, "an example has chosen and rejected, or prompt and completion"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, says, tmp_path):
    with pytest.raises(ArmError, match=says):
        load(tmp_path / "x.jsonl", [{"ask": "Why?", "good": "So.", "bad": "No."}], columns=columns)


NEARLY = {
    "prompt,good,bad": {"prompt": "prompt", "chosen": "good", "rejected": "bad"},
    "Prompt,Chosen,Rejected": {"prompt": "Prompt", "chosen": "Chosen", "rejected": "Rejected"},
    "prompt,chosen,rejectd": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejectd"},
    "id,questionText,badAnswer,goodAnswer": {
        "prompt": "questionText",
        "chosen": "goodAnswer",
        "rejected": "badAnswer",
    },
    "preferred,dispreferred": {"chosen": "preferred", "rejected": "dispreferred"},
    "prompt,answer 1,answer 2": {"prompt": "prompt", "chosen": "answer 1", "rejected": "answer 2"},
    "it's,good,bad": {"prompt": "it's", "chosen": "good", "rejected": "bad"},
    "chosen,rejected,promt": {"prompt": "promt", "chosen": "chosen", "rejected": "rejected"},
    "promt,completion": {"prompt": "promt", "completion": "completion"},
    "instruction,output": {"prompt": "instruction", "completion": "output"},
    "prompt,chosen": {"prompt": "prompt", "completion": "chosen"},
    "positive,negativ": {"chosen": "positive", "rejected": "negativ"},
    "id,prompt,response_a,response_b": {"prompt": "prompt", "chosen": "response_a", "rejected": "response_b"},
    "text_positive,text_negative": {"chosen": "text_positive", "rejected": "text_negative"},
    "x,y": {"chosen": "x", "rejected": "y"},
}


@pytest.mark.parametrize(("header", "columns"), NEARLY.items())
def test_columns_that_are_nearly_right_are_refused_with_the_options_that_name_them(header, columns, tmp_path):
    rows = f"{header}\n{','.join(f'{i} is told' for i in range(header.count(',') + 1))}\n"
    with pytest.raises(ArmError, match="name") as caught:
        load(tmp_path / "x.csv", rows)
    words = shlex.split(str(caught.value).partition(": --data.columns ")[2])
    assert tomllib.loads(f"columns = {words[0]}")["columns"] == columns
    assert columns_of(words[words.index("--columns") + 1 : words.index("in", 5)]) == columns
    assert load(tmp_path / "x.csv", rows, columns=columns)


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_texts_with_nothing_between_them_are_turns_of_a_conversation(part, tmp_path):
    """A model would read "Why?So." as one text."""
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    turns = {name: message("user" if name == "prompt" else "assistant", text) for name, text in row.items()}
    assert load(tmp_path / "x.jsonl", [row, row]) == [turns, turns]
    text = {**row, "chosen": " So.", "rejected": " No."}
    assert load(tmp_path / "x.jsonl", [row], chat=lambda: False) == [text]
    # one row with white space between them shows that they are texts
    spaced = {**row, part: f"{row[part]} " if part == "prompt" else f" {row[part]}"}
    assert load(tmp_path / "x.jsonl", [row, spaced]) == [row, spaced]


def test_prompts_alone_are_turns_of_a_conversation(tmp_path):
    """A chat model would go on with "Why?" instead of answering it."""
    rows = [{"prompt": "Why?"}, {"prompt": "How?"}]
    turns = [{"prompt": message("user", row["prompt"])} for row in rows]
    assert load(tmp_path / "x.jsonl", rows, answers=False) == turns
    for options in ({"chat": lambda: False}, {"form": "text"}):
        assert load(tmp_path / "x.jsonl", rows, answers=False, **options) == rows
    # white space at the end of a prompt shows that it goes on
    assert load(tmp_path / "x.jsonl", [*rows, {"prompt": "The sky is "}], answers=False)[0] == rows[0]
    assert load(tmp_path / "x.jsonl", turns, answers=False, form="text") == rows


def test_columns_on_the_command_line():
    assert columns_of(["prompt=a", "chosen={b} = c"]) == {"prompt": "a", "chosen": "{b} = c"}
    assert columns_of(None) == {}
    for word in ("prompt", "chosne=a"):
        with pytest.raises(ArmError, match="must be written PART=COLUMN"):
            columns_of([word])
    assert DataTable(name="x", columns={"prompt": "a"}).columns == {"prompt": "a"}


GOOD = {"prompt": "a b", "chosen": "c", "rejected": "d"}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({**GOOD, "chosen": ""}, "'chosen' is empty"),
        ({**GOOD, "rejected": "c"}, "chosen equals rejected"),
        ({**GOOD, "prompt": None}, "'prompt' is None"),
    ],
)
def test_errors_name_the_line(name, bad, says, tmp_path):
    with pytest.raises(ArmError, match=says) as caught:
        load(tmp_path / name, [GOOD, GOOD, bad])
    place = {".jsonl": "x.jsonl:3:", ".json": "x.json:12:", ".parquet": "x.parquet, row 3:"}[Path(name).suffix]
    assert place in str(caught.value)


def test_a_few_pairs_with_equal_answers_are_left_out_and_said_and_lines_still_count(tmp_path, capsys):
    rows = [{**GOOD, "prompt": f"a {i}"} for i in range(100)]
    rows[7] = {**rows[7], "rejected": "c"}
    assert load(tmp_path / "x.jsonl", rows) == load(tmp_path / "y.jsonl", rows[:7] + rows[8:])
    said = capsys.readouterr().err
    assert "1 of 100 rows" in said and "x.jsonl:8" in said and "y.jsonl" not in said
    with pytest.raises(ArmError, match=r"x\.jsonl:51: 'chosen' is empty"):
        load(tmp_path / "x.jsonl", [*rows[:50], {**GOOD, "chosen": ""}, *rows[51:]])
    many = [{**row, "rejected": "c"} if i < 3 else row for i, row in enumerate(rows)]
    with pytest.raises(ArmError, match=r"x\.jsonl:1: chosen equals rejected"):
        load(tmp_path / "x.jsonl", many)


def test_a_line_of_a_csv_file_is_counted_with_its_line_breaks(tmp_path):
    with pytest.raises(ArmError, match=r"x\.csv:5: 'chosen' is empty"):
        load(tmp_path / "x.csv", 'prompt,chosen,rejected\n"two\nlines",a,b\n\nc,,d\n')


def test_fields_of_a_csv_file_stay_text(tmp_path):
    rows = load(tmp_path / "x.csv", "prompt,chosen,rejected\n007,NA,null\n1.50,None,nan\n", form="text")
    assert [[*row.values()] for row in rows] == [["007", "NA", "null"], ["1.50", "None", "nan"]]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "a", "chosen": message("assistant", "b"), "rejected": message("assistant", "c")}],
         "x.jsonl:1 mixes two formats: prompt is a text, chosen is a list of messages"),
        ([{"prompt": message("user", [{"type": "text", "text": "a"}]), "chosen": message("assistant", "b"),
           "rejected": message("assistant", "c")}], "x.jsonl:1: 'prompt' has a message whose content is a list"),
        ([{"instruction": "a", "chosen": "b", "rejected": "c"}], "If that is the prompt, name it: --data.columns"),
    ],
    ids=["mixed", "parts", "another prompt"],
)  # fmt: skip
def test_formats_that_are_mixed_are_named(rows, says, tmp_path):
    with pytest.raises(ArmError, match=says):
        load(tmp_path / "x.jsonl", rows)
