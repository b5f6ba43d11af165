"""Data files, and rows that reach the tokeniser and the trainers."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tiny_data
from bad_inputs import Lab, Row
from datasets import Dataset, Image
from tiny_models import tiny

from steertune.recipes.lab.data import load_splits as two_splits
from steertune.recipes.lab.data import shuffled_pairs
from steertune.recipes.lab.files import read_rows, write_rows
from steertune.recipes.lab.sources import Reading, load_split
from steertune.recipes.lab.splits import SplitTable, load_splits
from steertune.recipes.lab.tables import DataTable
from steertune.trainers import tokenise
from steertune.trainers.row_checks import TokenLimits, check_rows, check_tokenised
from steertune.trainers.views import get_view

ROW = {"prompt": "the ", "chosen": "cat", "rejected": "dog"}
LINE = json.dumps(ROW) + "\n"
LINES = (3 * LINE).encode()
HEAD = b"prompt,chosen,rejected\n"
WELCOME = {
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "bom.json": b"\xef\xbb\xbf" + json.dumps([ROW] * 3).encode(),
    "bom.csv": b"\xef\xbb\xbf" + HEAD + b"the ,cat,dog\n",
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "windows.json": json.dumps([ROW] * 3, indent=1).encode().replace(b"\n", b"\r\n"),
    "windows.csv": (HEAD + b"the ,cat,dog\n").replace(b"\n", b"\r\n"),
    "a [1].jsonl": LINES,
    "no end of line.jsonl": LINES[:-1],
}


def load(lab: Lab, name: str, content: bytes) -> Any:
    return load_split(str(lab.file(name, content)), "train")


def file(says: str, name: str, content: bytes) -> Row:
    return (lambda lab: load(lab, name, content)), says


def named(header: str, says: str) -> Row:
    """A CSV file of one row, whose columns have names of their own."""
    values = ",".join(f"{i} is" for i in range(header.count(",") + 1))
    return file(re.escape(says), "x.csv", f"{header}\n{values}\n".encode())


def rows(says: str, *bad: dict[str, Any], conversational: bool = False) -> Row:
    """A good row, then bad ones, as every trainer looks at them."""
    data = [*tiny_data.pairs(1).to_list(), *bad]
    return (lambda lab: check_rows(Dataset.from_list(data), tiny_data.tokenizer())), says


def alone(says: str, *bad: dict[str, Any]) -> Row:
    return (lambda lab: tokenise(Dataset.from_list([*bad]), tiny_data.tokenizer())), says


def parquet(says: str, **columns: Any) -> Row:
    def call(lab: Lab) -> Any:
        pq.write_table(pa.table(columns), lab.here / "x.parquet")
        return load_split(str(lab.here / "x.parquet"), "train")

    return call, says


def pictures(lab: Lab) -> Any:
    picture = pa.array([{"bytes": None, "path": "http://nowhere.invalid/x.png"}], type=Image().pa_type)
    table = pa.table({"prompt": picture, "chosen": ["a"]})
    features = {"prompt": {"_type": "Image"}, "chosen": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), lab.here / "x.parquet")
    return load_split(str(lab.here / "x.parquet"), "train")


def pipe(lab: Lab) -> Any:
    os.mkfifo(lab.here / "x.jsonl")
    return load_split(str(lab.here / "x.jsonl"), "train")


def folder(says: str, *names: str, split: str = "train") -> Row:
    def call(lab: Lab) -> Any:
        for name in names:
            lab.file(f"data/{name}", LINES)
        return load_split("./data", split)

    return call, says


def splits(says: str, **changes: Any) -> Row:
    """The grid's splits of a task with 24 training and 6 test rows."""

    def call(lab: Lab) -> Any:
        options = {"validation": 4, "test": 6, "scorer": 2} | changes
        columns, largest = options.pop("columns", None), options.pop("largest", 4)
        return load_splits(str(lab.root / "task"), SplitTable(**options), largest, reading=Reading(columns or {}))

    return call, says


def kept(says: str, change: Any) -> Row:
    """Rows that a recipe wrote to read again, spoiled."""

    def call(lab: Lab) -> Any:
        write_rows(lab.here / "rows.jsonl", [ROW, ROW])
        text = (lab.here / "rows.jsonl").read_bytes()
        (lab.here / "rows.jsonl").write_bytes(change(text))
        return read_rows(lab.here / "rows.jsonl", "Delete it.")

    return call, says


def view(says: str, name: str, data: list[dict[str, Any]], **options: Any) -> Row:
    return (lambda lab: get_view(name, **options)(data)), says


UTF8 = "rows in UTF-8, all with the same columns"
TEXT = "must be a string or a list of messages"
DAMAGED = "is damaged .*Delete it"

ROWS: dict[str, Row] = {
    # files
    "jsonl of nothing": file("x.jsonl is empty: rows are expected", "x.jsonl", b""),
    "jsonl of empty lines": file(UTF8, "x.jsonl", b"\n\n"),
    "jsonl cut off": file(UTF8, "x.jsonl", LINES[:-9]),
    "jsonl of NUL": file(UTF8, "x.jsonl", b"\0" * 99),
    "jsonl in UTF-16": file(UTF8, "x.jsonl", (3 * LINE).encode("utf-16")),
    "jsonl in Latin-1": file("Invalid UTF8 sequence.*Save it as UTF-8", "x.jsonl", LINES.replace(b"cat", b"caf\xe9")),
    "jsonl with a key twice": file("specified twice", "x.jsonl", b'{"prompt": "a", "prompt": "b"}\n'),
    "jsonl with half a character": file("surrogate", "x.jsonl", b'{"prompt": "\\ud800"}\n'),
    "json nested 200000 deep": file(UTF8, "x.json", b"[" * 200_000),
    "json of a number": file(UTF8, "x.json", b"5"),
    "json that is TOML": file(UTF8, "x.json", b"[data]\nname = 5\n"),
    "csv of nothing": file("is empty", "x.csv", b""),
    "csv of a header": file("names columns, and no rows", "x.csv", HEAD),
    "csv with an open quotation": file(UTF8, "x.csv", HEAD + b'"the,cat,dog\n'),
    "csv in Latin-1": file(UTF8, "x.csv", HEAD + b"caf\xe9,cat,dog\n"),
    "csv with longer rows": file("rows have 2 more fields than its first line", "x.csv", HEAD + b"a,b,c,d,e\n"),
    "csv with one longer row": file("Expected 3 fields", "x.csv", HEAD + b"a,b,c\na,b,c,d\n"),
    "csv with a column twice": file("column 'prompt' twice. Rename one", "x.csv", b"prompt,prompt,chosen\na,b,c\n"),
    "csv with good and bad": named("question,good,bad", 'prompt = "question", chosen = "good", rejected = "bad"'),
    "csv with a prompt, good and bad": named("prompt,good,bad", "prompt=prompt chosen=good rejected=bad"),
    "csv with capitals": named("Prompt,Chosen,Rejected", "prompt=Prompt chosen=Chosen rejected=Rejected"),
    "csv with a misspelt rejected": named("prompt,chosen,rejectd", "prompt=prompt chosen=chosen rejected=rejectd"),
    "csv with a misspelt prompt": named("promt,chosen,rejected", "prompt=promt chosen=chosen rejected=rejected"),
    "csv with a misspelt completion": named("prompt,completoin", "prompt=prompt completion=completoin"),
    "csv with spaces in names": named("prompt,good answer,bad answer", "'chosen=good answer' 'rejected=bad answer'"),
    "csv with an instruction and an output": named("instruction,output", "prompt=instruction completion=output"),
    "csv with a prompt alone": named("prompt", "prompt=prompt chosen=... rejected=..."),
    "csv with columns of no meaning": named("id,a,b,c", "prompt=... chosen=... rejected=..."),
    "csv with columns without names": file("more fields than its first line", "x.csv", b"prompt,,\na,b,c\n"),
    "parquet of nothing": file("is empty", "x.parquet", b""),
    "parquet of noise": file("cannot be read as parquet", "x.parquet", b"PAR1" + bytes(99) + b"PAR1"),
    "parquet that is json": file("cannot be read as parquet", "x.parquet", LINES),
    "parquet that opens addresses": (pictures, "hold pictures or sound; text is expected"),
    "parquet with half a character": parquet(
        "Invalid UTF8",
        prompt=pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]),
    ),
    "pickle": file(r"x.pkl must end in one of \['.csv'", "x.pkl", b"\x80\x04N."),
    "python": file("x.py must end in one of", "x.py", b"raise SystemExit"),
    "zip": file("x.zip must end in one of", "x.zip", b"PK"),
    "a pipe": (pipe, "no such file or folder"),
    "a file that is not there": ((lambda lab: load_split("./no.jsonl", "train")), "no such file or folder.*cautious"),
    "a folder without the split": folder(
        "one file for split 'test' expected, found .*train", "train.jsonl", split="test"
    ),
    "a folder with the split twice": folder("one file for split 'train' expected", "train.jsonl", "train.csv"),
    "a folder of nothing": ((lambda lab: load_split(".", "train")), "one file for split 'train' expected, found"),
    "a Hub name that is a path": ((lambda lab: load_split("..//../etc/passwd", "train")), "data.name='..//../etc"),
    "a Hub name of nothing": ((lambda lab: load_split("no such/data set", "train")), "neither an embedded task .*nor"),
    # tables of data
    "more training rows than there are": (
        lambda lab: two_splits(DataTable(name=str(lab.root / "task"), train=99, test=2)),
        "99 rows requested.*Ask for fewer",
    ),
    "more test rows than there are": (
        lambda lab: two_splits(DataTable(name=str(lab.root / "task"), train=2, test=99)),
        "99 rows requested.*Ask for fewer",
    ),
    "shuffled pairs of one": ((lambda lab: shuffled_pairs(tiny_data.pairs(1))), "needs at least 2 examples"),
    "shuffled pairs without prompts": (
        lambda lab: shuffled_pairs(tiny_data.pairs(3).remove_columns("prompt")),
        "needs the columns prompt and rejected",
    ),
    "splits with too large a pool": splits("99 training examples requested, 18 are left", largest=99),
    "splits with too many validation rows": splits("splits.validation=99, but only 24", validation=99),
    "splits with too many test rows": splits("splits.test=99, but only 6", test=99),
    "splits with an unknown column": splits("cannot be filled in .*'toxic'", columns={"prompt": "{toxic}"}),
    "splits with an attribute in a column": splits(
        "cannot be filled in", columns={"prompt": "{prompt.__class__.__mro__}", "chosen": "a", "rejected": "b"}
    ),
    "splits with an open brace": splits("cannot be filled in", columns={"prompt": "{", "chosen": "a"}),
    "splits with columns by number": splits("cannot be filled in", columns={"prompt": "{0}", "chosen": "a"}),
    # rows
    "a prompt that is None": rows(f"Row 1: 'prompt' is None. It {TEXT}", ROW | {"prompt": None}),
    "a chosen answer that is None": rows(f"Row 1: 'chosen' is None. It {TEXT}", ROW | {"chosen": None}),
    "a row without its answer": rows("Row 1: 'rejected' is None", {"prompt": "the ", "chosen": "cat"}),
    "prompts that are numbers": alone(f"Row 0: 'prompt' is 5. It {TEXT}", ROW | {"prompt": 5}),
    "prompts that are not numbers": alone(f"Row 0: 'prompt' is nan. It {TEXT}", ROW | {"prompt": math.nan}),
    "answers that are truth values": alone("Row 0: 'chosen' is True", ROW | {"chosen": True}),
    "answers that are tables": alone("Row 0: 'chosen' is {'a': 1}", ROW | {"chosen": {"a": 1}}),
    "answers that are empty lists": alone(f"Row 0: 'chosen' is \\[\\]. It {TEXT}", ROW | {"chosen": []}),
    "answers that are lists of texts": alone("the message 'cat'. .*'role': ..., 'content'", ROW | {"chosen": ["cat"]}),
    "messages without a role": alone(
        "Row 0: 'messages' has the message .*must be", {"messages": [{"content": "cat"}]}
    ),
    "messages without content": alone("Row 0: 'messages' has the message", {"messages": [{"role": "user"}]}),
    "messages of a role that is a number": alone(
        "Row 0: 'messages' has the message", {"messages": [{"role": 5, "content": "cat"}]}
    ),
    "messages of content that is a number": alone(
        "a message with content=5. It must be a string", {"messages": [{"role": "user", "content": 5}]}
    ),
    "conversations without from": alone("'from': ..., 'value': ...", {"conversations": [{"value": "cat"}]}),
    "texts that are numbers": alone(f"Row 0: 'text' is 7. It {TEXT}", {"text": 7}),
    "columns that are almost right": rows(
        "Row 1: 'chosen' is None", {"prompt": "the ", "choosen": "cat", "rejected": "a"}
    ),
    "a token that the model does not have": (
        lambda lab: check_tokenised(None, Dataset.from_list([{"input_ids": [1, 64]}]), TokenLimits(vocabulary=64)),
        "Row 0: input_ids holds token 64, but the model has 64: 0 to 63.*resize_token_embeddings",
    ),
    "a negative token": (
        lambda lab: check_tokenised(None, Dataset.from_list([{"input_ids": [-1, 3]}]), TokenLimits(vocabulary=64)),
        "holds token -1",
    ),
    "a tokenizer with more words than the model": (
        lambda lab: tiny_data.trainer("dpo", lab.here, model=tiny(vocab_size=16)),
        "holds token .*the model has 16",
    ),
    # rows that recipes keep
    "kept rows cut off in a line": kept(DAMAGED, lambda text: text[:-20]),
    "kept rows cut off behind a line": kept("its end is missing", lambda text: b"".join(text.splitlines(True)[:-1])),
    "kept rows with a line left out": kept("its end is missing", lambda text: b"".join(text.splitlines(True)[1:])),
    "kept rows of nothing": kept("its end is missing", lambda text: b""),
    "kept rows with a changed letter": kept("checksum does not match", lambda text: text.replace(b"cat", b"cot", 1)),
    "kept rows that are no UTF-8": kept("Save it as UTF-8", lambda text: b"\xff" + text),
    # views of rows
    "a view of rows without prompts": view("Give a column 'prompt'", "instruction", [{"text": "a"}], text="Be kind."),
    "demonstrations of too few rows": view(
        "k=4 demonstrations need as many other examples .got 0", "demonstrations", [ROW]
    ),
    "contrast demonstrations without bad answers": view(
        "shows rejected answers, but the data have none",
        "demonstrations",
        [{"prompt": p, "completion": "a"} for p in "ab"],
        k=1,
        contrast=True,
    ),
    "a system message for plain text": view("needs conversations", "instruction", [ROW], text="a", where="system"),
    "an instruction behind an answer": view(
        "must end with a user message",
        "instruction",
        [{"prompt": [{"role": "assistant", "content": "a"}]}],
        text="Be kind.",
    ),
}
