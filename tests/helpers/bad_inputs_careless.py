"""What careless users bring: rows of other tools in other shapes, options that change nothing, and values that no run
can have, for every command. All of it is refused before a model is loaded, and leaves no file behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs import Lab, Row, run
from bad_inputs_commands import command
from trl import DPOConfig

from steertune.recipes import cli
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.eval import check_options_of_pairs, check_request
from steertune.recipes.lab.arm import make_arm
from steertune.recipes.lab.checks import check_training, check_trains
from steertune.recipes.lab.data import load_data
from steertune.recipes.lab.files import check_place
from steertune.recipes.lab.options import columns_of
from steertune.recipes.lab.processes import check_threads, device_of
from steertune.recipes.lab.tables import DataTable
from steertune.recipes.lab.transcripts import read_transcripts

NOUNS = "cat dog sky sea bird tree lamp road ship coin king moon rock rain door wine fish hill milk nest".split()
PAIRS = [{"prompt": f"What is a {noun}?", "chosen": f"a {noun} sits", "rejected": f"a {noun} runs"} for noun in NOUNS]


def turn(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def conversation(prompt: str = "user", answer: str = "assistant") -> Callable[[dict[str, str]], dict[str, Any]]:
    """A pair as messages of these roles."""
    return lambda row: {part: turn(prompt if part == "prompt" else answer, text) for part, text in row.items()}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def data(says: str, text: str | bytes, name: str = "x.jsonl", **table: Any) -> Row:
    """A file as the data of an arm."""
    return (lambda lab: load_data(DataTable(name=str(lab.file(name, text)), **table))), says


def every(says: str, change: Callable[[dict[str, str]], dict[str, Any]], **table: Any) -> Row:
    """Every row changed."""
    return data(says, lines([change(dict(row)) for row in PAIRS]), **table)


def fourth(says: str, **change: Any) -> Row:
    """The fourth row changed, which the message names."""
    return data(f"x.jsonl:4.*{says}", lines([*PAIRS[:3], {**PAIRS[3], **change}, *PAIRS[4:]]))


def csv(says: str, *rows: str, head: str = "prompt,chosen,rejected") -> Row:
    return data(says, "\n".join([head, *rows]) + "\n", "x.csv")


def columns(says: str, **named: str) -> Row:
    return data(says, lines(PAIRS), columns=named)


def one_file(says: str, **table: Any) -> Row:
    """An option that changes nothing where one file is divided."""
    return data(says, lines(PAIRS), **table)


def arm(says: str, **tables: Any) -> Row:
    return (lambda lab: make_arm({"name": "mine", "data": {"name": "cautious_advice"}, **tables})), says


def trainer(says: str, **options: Any) -> Row:
    """What `[trainer]` says, as far as it is known before a model is loaded."""

    def call(lab: Lab) -> Any:
        made = make_arm({"name": "mine", "data": {"name": "cautious_advice"}, "trainer": options})
        check_training(made, DPOConfig)
        return check_trains(made)

    return call, says


def secret(text: str) -> Row:
    """A setting that holds a secret; the message does not."""

    def call(lab: Lab) -> Any:
        try:
            return make_arm({"name": "mine", "data": {"name": text}})
        except ValueError as error:
            assert text not in str(error)
            raise

    return call, "data.name holds a secret"


def grid(says: str, **tables: Any) -> Row:
    return (lambda lab: make_grid({**lab.tables(), **tables})), says


def transcripts(says: str, kind: Any, *rows: dict[str, Any], **named: Any) -> Row:
    """Rows that a monitor, or a patch, is made of."""
    return (
        lambda lab: read_transcripts(str(lab.file("x.jsonl", lines([*rows]))), kind, lambda: True, named or None)
    ), says


def on_pairs(says: str, recipe: str, *words: str) -> Row:
    """A command on a good file of pairs and the lab's model; it leaves nothing."""

    def call(lab: Lab) -> Any:
        file = lab.file("pairs.jsonl", lines(PAIRS))
        before = {*lab.here.rglob("*")}
        place = ["--folder", "o"] if recipe in ("sweep", "map") else []
        try:
            return run(cli.main, [recipe, str(file), "--model", f"{lab.root}/model", *place, *words])
        finally:
            assert {*lab.here.rglob("*")} == before

    return call, says


ASKED = "mixes two formats"
FEW = "Ask for fewer|too few"
NO_EFFECT = "has no effect on"
LEAST = "Input should be greater than or equal to"
MOST = "Input should be less than or equal to 1000000"

ROWS: dict[str, Row] = {
    # formats of other tools
    "UltraFeedback, with its prompt beside the messages": every(
        "mixes two formats.*begin with the question, so remove the column prompt",
        lambda row: {
            "prompt": row["prompt"],
            **{side: turn("user", row["prompt"]) + turn("assistant", row[side]) for side in ("chosen", "rejected")},
        },
    ),
    "KTO, whose labels call answers unwanted": every(
        "x.jsonl:1: its label is false .20 of 20 rows.*make pairs",
        lambda row: {"prompt": row["prompt"], "completion": row["rejected"], "label": False},
    ),
    "OpenAI's preference rows": every(
        'chosen = "preferred_output", rejected = "non_preferred_output"',
        lambda row: {
            "input": row["prompt"],
            "preferred_output": row["chosen"],
            "non_preferred_output": row["rejected"],
        },
    ),
    "Alpaca": every(
        'prompt = "instruction", completion = "output"',
        lambda row: {"instruction": row["prompt"], "input": "", "output": row["chosen"]},
    ),
    "Alpaca of pairs": every(
        'rejected = "output_2"|"output_1"',
        lambda row: {"instruction": row["prompt"], "output_1": row["chosen"], "output_2": row["rejected"]},
    ),
    "SHP": every(
        "human_ref_A",
        lambda row: {
            "history": row["prompt"],
            "human_ref_A": row["chosen"],
            "human_ref_B": row["rejected"],
            "labels": 1,
        },
    ),
    "a column chosen that is not": every(
        "no prompt, and 'Question'. If that is the prompt",
        lambda row: {"Question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]},
    ),
    "roles of ShareGPT": every("message with the role 'human'.*one of system, developer, user", conversation("human")),
    "answers of gpt": every("message with the role 'gpt'", conversation(answer="gpt")),
    "a role in capitals": every("message with the role 'User'", conversation("User")),
    "answers of the user": every(
        "'chosen' ends with a message with the role 'user'.*assistant's", conversation(answer="user")
    ),
    "answers of a tool": every("ends with a message with the role 'tool'", conversation(answer="tool")),
    "content in parts": every(
        "a list of parts. The models here read text",
        lambda row: {
            part: turn("user" if part == "prompt" else "assistant", [{"type": "text", "text": text}])
            for part, text in row.items()
        },
    ),
    "an answer in messages, the prompt a text": every(
        ASKED, lambda row: {**row, "chosen": turn("assistant", row["chosen"])}
    ),
    "token ids": every("holds token ids", lambda row: {"input_ids": [1, 2], "labels": [-100, 2]}),
    "token ids beyond any vocabulary": every(
        "holds token ids", lambda row: {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [10**9]}
    ),
    # one row that is not like the others
    "a fourth prompt in messages": fourth(ASKED, prompt=turn("user", "a")),
    "a fourth prompt that is null": fourth("'prompt' is None", prompt=None),
    "a fourth answer that is a number": fourth("'chosen' is 7", chosen=7),
    "a fourth answer that is true": fourth("'rejected' is True", rejected=True),
    "a fourth answer of spaces": fourth("'chosen' is empty", chosen="  "),
    "a fourth answer that is a table": fourth("'chosen' is {", chosen={"text": "a"}),
    "a fourth pair without contrast": fourth("chosen equals rejected", chosen="b", rejected="b"),
    "a fourth prompt of two kinds": fourth(ASKED, prompt=["a"]),
    # one file, and options that change nothing
    "a split of a single file": one_file(f"train_split='validation' {NO_EFFECT}", train_split="validation"),
    "a test split of a single file": one_file(f"test_split='train' {NO_EFFECT}", test_split="train"),
    "near-duplicates of a single file": one_file(f"near_duplicates=0.5 {NO_EFFECT}", near_duplicates=0.5),
    "near-duplicates to drop of a single file": one_file(NO_EFFECT, drop_near_duplicates=True),
    # CSV
    "csv with semicolons": csv("separated by ';'. Save it with commas", "a;b;c", head="prompt;chosen;rejected"),
    "csv with tabs": csv("separated by '\\\\t'", "a\tb\tc", head="prompt\tchosen\trejected"),
    "csv with bars": csv("separated by '.'", "a|b|c", head="prompt|chosen|rejected"),
    "csv with nothing below its names": csv("names columns, and no rows"),
    "csv with an index without a name": csv("Name every column there", "0,a,b,c", head=",prompt,chosen,rejected"),
    "csv with a longer first row": csv("Name every column there", "a,b,c,d"),
    "csv with a gap": csv("x.csv:3: 'rejected' is empty", "a,b,c", "a,b,"),
    "csv with a short row": csv("x.csv:3: 'rejected' is empty", "a,b,c", "a,b"),
    "csv with a cut quotation": csv("cannot be read as csv", "a,b,c", '"a,b,c'),
    "csv without names": csv("does not have the columns", "a,b,c", head="What is a cat?,it sits,it runs"),
    "csv of the wrong case": csv('prompt = "PROMPT"', "a,b,c", head="PROMPT,CHOSEN,REJECTED"),
    # files
    "a file with tabs": data("must end in one of", "a", "x.tsv"),
    "a text file": data("must end in one of", "a", "x.txt"),
    "a compressed file": data("must end in one of", "a", "x.jsonl.gz"),
    "a spreadsheet": data("must end in one of", b"PK", "x.xlsx"),
    "an ending in capitals": data("must end in one of", lines(PAIRS), "x.JSONL"),
    "json under a key": data("does not have the columns", json.dumps({"data": PAIRS}), "x.json"),
    "json by columns": data(
        "must be|has the message", json.dumps({k: [row[k] for row in PAIRS] for k in PAIRS[0]}), "x.json"
    ),
    "json with a comma too many": data("cannot be read as json", json.dumps(PAIRS)[:-1] + ",]", "x.json"),
    "lines of texts": data("cannot be read as json", '"a"\n"b"\n'),
    "lines of numbers": data("cannot be read as json", "1\n2\n"),
    "lines of lists": data("cannot be read as json|columns", "[1]\n[2]\n"),
    "a prompt of NaN": data(
        "x.jsonl:2: 'prompt' is None", lines(PAIRS[:1]) + '{"prompt": NaN, "chosen": "a", "rejected": "b"}\n'
    ),
    # columns
    "a column that is not there": columns("cannot be filled in .prompt='question'", prompt="question"),
    "an answer that is a sentence": columns("cannot be filled in", chosen="the best answer", rejected="rejected"),
    "an answer that is its prompt's twin": columns("chosen equals rejected", chosen="chosen", rejected="chosen"),
    "a column behind a dot": columns("cannot be filled in", prompt="{prompt.__class__}"),
    "a column in brackets": columns("cannot be filled in", prompt="{prompt[0]}"),
    "a column by number": columns("cannot be filled in", prompt="{0}"),
    "a column padded to a gigabyte": columns("cannot be filled in", prompt="{prompt:>1000000000}"),
    "a column converted": columns("cannot be filled in", prompt="{prompt!r}"),
    "an open brace": columns("cannot be filled in", prompt="{prompt"),
    "a column of no name": columns("cannot be filled in", prompt=""),
    # strengths that nothing has, before there is a vector
    "training at a strength of 1e308": arm(f"evaluation.strengths.0: {MOST}", evaluation={"strengths": [1e308]}),
    "training at a strength of -1e7": arm(LEAST, evaluation={"strengths": [-1e7]}),
    "training at a strength twice": arm("1 occurs twice", evaluation={"strengths": [1.0, 1.0]}),
    "a grid at a strength of 1e30": grid(MOST, budget={"strengths": [1e30]}),
    "a sweep at a strength of 1e300": on_pairs(MOST, "sweep", "--strengths", "1e300"),
    "a sweep at strength 0": on_pairs("0 is the base model", "sweep", "--strengths", "0"),
    "a sweep at no number": on_pairs("finite number", "sweep", "--strengths", "nan"),
    # [trainer], as far as it is known without weights
    "training at a rate of 0": trainer("learning_rate=0 trains nothing", learning_rate=0.0),
    "reports to nothing known": trainer("nothing_known is not supported", report_to="nothing_known"),
    "an optimiser that is not installed": trainer("install `galore_torch`", optim="galore_adamw"),
    "a schedule with an unknown argument": trainer(
        "unexpected keyword argument 'nope'", lr_scheduler_kwargs={"nope": 1}
    ),
    "a schedule without its argument": trainer("", lr_scheduler_type="warmup_stable_decay"),
    "an upload": arm("push_to_hub=True: recipes write to the output folder only", trainer={"push_to_hub": True}),
    "a place for an upload": arm(
        "hub_model_id='me/mine': recipes upload nothing", trainer={"hub_model_id": "me/mine"}
    ),
    "an evaluation in between": arm("recipes measure before and after", trainer={"eval_strategy": "steps"}),
    "answers that nobody asks for": arm(
        "no instructions for that .*Set answers.positive",
        data={"name": "./mine.jsonl"},
        answers={"chosen": "instructed"},
    ),
    "opposite answers that nobody asks for": arm(
        "Set answers.negative", data={"name": "./mine.jsonl"}, answers={"rejected": "opposed"}
    ),
    "an option of a loss without options": arm(
        "Unknown option .*Available: none", loss={"name": "cross_entropy", "beta": 1}
    ),
    # options of commands
    "100000 threads": (lambda lab: check_threads(100_000), "threads=100000, but this machine has"),
    "a part of an example twice": (
        lambda lab: columns_of(["prompt=a", "prompt=b"]),
        "names prompt twice: 'a' and 'b'",
    ),
    "a part of an example of nothing": (lambda lab: columns_of(["promt=a"]), "Did you mean 'prompt'"),
    "an output below a file": (lambda lab: check_place(lab.file("file", "x") / "o"), "cannot write to"),
    "an output among the processes": (lambda lab: check_place(Path("/proc/o")), "cannot write to|cannot"),
    "a device of nothing": (lambda lab: device_of("tpu9"), "--device 'tpu9' cannot be used"),
    "a device without numbers": (lambda lab: device_of("meta"), "it holds no weights"),
    "a device of a negative number": (lambda lab: device_of("cuda:-3"), "cannot be used"),
    "a sweep of no training rows": on_pairs(f"train: {LEAST} 1", "sweep", "--train", "0"),
    "a sweep of layer 99": on_pairs("layer 99 does not exist, the model has 4", "sweep", "--layers", "99"),
    "a sweep of a layer of nothing": on_pairs("--layers 'nan'", "sweep", "--layers", "nan"),
    "a sweep with a scorer that scores nothing": on_pairs(
        "--generations must be 1 or more", "sweep", "--scorer", "classifier", "--generations", "0"
    ),
    "a map of a KL of 0": on_pairs("--kl 0.0 must be above 0", "map", "--kl", "0"),
    "a map of a KL of nothing": on_pairs("--kl nan", "map", "--kl", "nan"),
    "a map of one layer": on_pairs("a map needs 3 different layers", "map", "--layers", "1"),
    "a map of a million sets of layers": on_pairs("no 1000000 different sets", "map", "--combinations", "1000000"),
    "a map of rows below nothing": on_pairs("whole number of 1 or more", "map", "--rows", "0"),
    "tasks named twice": (lambda lab: check_request(["a", "a"], [1.0], None, None, None), "names 'a' twice"),
    "demonstrations in front of pairs": (
        lambda lab: check_options_of_pairs(["x.jsonl"], 3, False, None),
        "--fewshot 3 is for lm-eval's own tasks",
    ),
    "a chat template around pairs": (
        lambda lab: check_options_of_pairs(["x.jsonl"], None, True, None),
        "--chat is for lm-eval's own tasks",
    ),
    "columns without pairs": (
        lambda lab: check_options_of_pairs(["mmlu"], None, False, ["prompt=a"]),
        "--columns names the columns of pairs",
    ),
    "info about rows without rows": command("--rows is only used with --data", "info", "x", "--rows", "4"),
    "info about a loss without rows": command("--loss is only used with --data", "info", "x", "--loss", "dpo"),
    # secrets of other services
    "a token of GitHub, the newer form": secret("github_pat_" + "1a2B_" * 8),
    "a token of GitLab": secret("glpat-" + "a1B2-" * 5),
    "a token of Slack": secret("xoxb-" + "1234567890-" * 3),
    "a key of Google": secret("AIza" + "a1B2_" * 7),
    "a web token": secret(".".join(["eyJ" + "a1B2" * 4, "eyJ" + "c3D4" * 4, "e5F6" * 4])),
    "a token in a query": secret("https://host/x.jsonl?access_token=abcdef"),
    "a signature in a query": secret("https://host/x.jsonl?v=1&X-Amz-Signature=abcdef"),
    # transcripts of monitors and patches
    "a transcript without an answer": transcripts("its answer is empty", "bad", {"prompt": "a", "bad": ""}),
    "a transcript without a prompt": transcripts("its prompt is empty", "bad", {"prompt": "", "bad": "b"}),
    "transcripts of nothing known": transcripts("has no prompt", "bad", {"x": "a", "y": "b"}),
    "transcripts without labels": transcripts(
        "does not say which rows are bad", "labelled", {"prompt": "a", "completion": "b"}
    ),
    "a label of 2": transcripts("its label is 2", "labelled", {"prompt": "a", "completion": "b", "bad": 2}),
    "a label of null": transcripts(
        "its label is None|does not say",
        "labelled",
        {"prompt": "a", "completion": "b", "bad": True},
        {"prompt": "c", "completion": "d", "bad": None},
    ),
    "messages that end with the user": transcripts(
        "ends with the answer of the assistant", "any", {"messages": turn("assistant", "b") + turn("user", "a")}
    ),
    "a transcript's column that is not there": transcripts(
        "has no column 'q'", "any", {"prompt": "a", "completion": "b"}, prompt="q"
    ),
}
