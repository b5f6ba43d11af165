"""Arguments of the library's functions and classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tiny_data
import torch
from bad_inputs import Lab, Row
from peft import get_peft_model
from tiny_models import steered, tiny, tokens

from steertune.adapters import SteeringVectorConfig, directions, set_strength
from steertune.adapters.analysis.activations import collect
from steertune.adapters.analysis.probing import read
from steertune.losses import get_loss
from steertune.recipes.ablation.statistics.paired import p_value
from steertune.recipes.chat import Chat
from steertune.recipes.lab.augmentation import get_augmenter, grown
from steertune.recipes.lab.augmentation import read as read_augmentation
from steertune.recipes.lab.intervals import interval
from steertune.recipes.lab.scorers import fit
from steertune.recipes.lab.scorers import read as read_scorer
from steertune.trainers import CheckpointError, FrozenPrefix, get_bias, get_view
from steertune.trainers.checkpoints import check_checkpoint

assert issubclass(CheckpointError, ValueError)


def row(says: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Row:
    return (lambda lab: function(*arguments, **options)), says


def loss(says: str, name: Any, **options: Any) -> Row:
    return row(says, get_loss, name, **options)


def bias(says: str, name: Any, **options: Any) -> Row:
    return row(says, get_bias, name, **options)


def view(says: str, name: Any, **options: Any) -> Row:
    return row(says, get_view, name, **options)


def vector(says: str, **options: Any) -> Row:
    return row(says, SteeringVectorConfig, **options)


def trainer(says: str, kind: str = "dpo", **options: Any) -> Row:
    return (lambda lab: tiny_data.trainer(kind, lab.here, **options)), says


def resumed(says: str, folder: str) -> Row:
    def call(lab: Lab) -> Any:
        lab.file("checkpoint-2/other.txt", "x")
        lab.file("checkpoint-3/trainer_state.json", '{"global_step": 9}')
        lab.file("checkpoint-4/trainer_state.json", "[" * 100_000)
        lab.file("checkpoint-5/trainer_state.json", b"\xff\xfe")
        lab.file("checkpoint-6/trainer_state.json", '{"global_step": 6}')
        lab.file("checkpoint-6/checksums.json", '{"trainer_state.json": "00"}')
        lab.file("checkpoint-7/trainer_state.json", '{"global_step": 7}')
        lab.file("checkpoint-7/checksums.json", '["../../secret"]')
        lab.file("checkpoint-8/trainer_state.json", '{"global_step": 8}')
        lab.file("checkpoint-8/optimizer.pt", b"\x80\x04N.")
        return check_checkpoint(lab.here / folder)

    return call, says


def scorer(says: str, **table: Any) -> Row:
    return row(says, read_scorer, table)


def more(says: str, **table: Any) -> Row:
    return row(says, read_augmentation, table)


BATCH = {"input_ids": tokens(2), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
WHOLE = {**BATCH, "completion_mask": torch.zeros(2, 8, dtype=torch.long)}
PAIRS = (torch.ones(4, 8), torch.zeros(4, 8))
LOSSES = r"Unknown loss .* Available: 'bipo'"

ROWS: dict[str, Row] = {
    # get_loss
    "loss of a path": loss(LOSSES, "../adapters/config"),
    "loss of a private file": loss(LOSSES, "_base"),
    "loss of a module elsewhere": loss(LOSSES, "os"),
    "loss of nothing": loss(LOSSES, ""),
    "loss of None": loss(LOSSES, None),
    "loss of a number": loss(LOSSES, 5),
    "loss of look-alike letters": loss(LOSSES, "dp\u043e"),
    "loss with an unknown option": loss("Unknown option of loss 'dpo' 'betta'.*Did you mean 'beta'", "dpo", betta=1.0),
    "loss with beta of text": loss("beta='0.1' must be a finite number", "dpo", beta="0.1"),
    "loss with beta NaN": loss("beta=nan must be a finite number", "dpo", beta=math.nan),
    "loss with beta True": loss("beta=True must be a finite number", "dpo", beta=True),
    "loss with beta 0": loss("beta=0 must be above 0", "ipo", beta=0),
    "loss with an unknown contrast": loss("contrast='pared' must be one of 'paired'", "dpo", contrast="pared"),
    "loss with a contrast that is None": loss("contrast=None must be one of", "dpo", contrast=None),
    "loss without pairs, contrasted": loss("needs a loss on pairs", "cross_entropy", contrast="unpaired"),
    "loss without a reference, without contrast": loss("contrast='none' keeps", "simpo", contrast="none"),
    "loss with a negative KL": loss("neutral_kl=-1 must be above 0", "dpo", neutral_kl=-1),
    "loss with a KL of text": loss("neutral_kl='a' must be a finite number", "dpo", neutral_kl="a"),
    "loss with a cap of NaN": loss("change_cap=nan must be a finite", "dpo", change_cap=math.nan),
    "loss capped at a layer of text": loss("'x'", "dpo", change_cap=1.0, cap_layers="x"),
    "loss that hands over to nothing": loss(LOSSES, "dpo", then="nothing"),
    "loss that hands over at the end": loss(
        "then_after=1.0 must be .*: the first loss's share", "dpo", then="ipo", then_after=1.0
    ),
    "loss that hands over at text": loss("then_after='x'", "dpo", then="ipo", then_after="x"),
    "loss with the weight of no cap": loss("cap_weight=2.0 has no effect without change_cap", "dpo", cap_weight=2.0),
    "loss with the layers of no cap": loss("cap_layers=0.5 has no effect without change_cap", "dpo", cap_layers=0.5),
    "loss with the share of no other": loss("then_after=0.3 has no effect without then", "dpo", then_after=0.3),
    "loss that adds up its answers, unpaired": loss("changes nothing", "unlikelihood", contrast="unpaired"),
    "loss that hands over under a cap": loss("Add these to the two losses", "dpo", then="ipo", change_cap=1.0),
    "loss object with options": loss("go with a loss name, not with an object", get_loss("dpo"), beta=1.0),
    "loss with strengths of 0": loss(r"factors\[0\]=0 must be above 0", "reps", factors=[0]),
    "loss with strengths that are a number": loss("factors=5", "reps", factors=5),
    "loss with an unknown suppression": loss("suppress='all' must be one of", "reps", suppress="all"),
    # get_bias
    "bias of a path": bias("Unknown bias '../os'", "../os"),
    "bias of a number": bias("Unknown bias 5", 5),
    "bias with an unknown option": bias("Unknown option of bias 'one_write' 'sit'.*'site'", "one_write", sit="mlp"),
    "bias of an unknown site": bias("site='mpl' must be", "one_write", site="mpl"),
    "bias of a layer of text": bias("layer='x'", "one_write", layer="x"),
    "bias of a negative layer": bias("layer=-1", "one_write", layer=-1),
    "bias of an unknown direction": bias("direction='men' is not one of", "direction_start", direction="men"),
    "bias of a scale of NaN": bias("scale=nan", "direction_start", scale=math.nan),
    # get_view
    "view of a path": view("Unknown view '../instruction'", "../instruction"),
    "view with an unknown option": view("Unknown option of view 'instruction' 'txt'", "instruction", txt="a"),
    "view without a text": view("text='  ' must not be empty", "instruction", text="  "),
    "view without its option": view("text", "instruction"),
    "view with a text that is a number": view("text=5", "instruction", text=5),
    "view in an unknown place": view("where='behind' must be", "instruction", text="a", where="behind"),
    "view of no demonstrations": view("k=0 must be a whole number, 1 or more", "demonstrations", k=0),
    "view of demonstrations of text": view(
        "k='4' of view 'demonstrations' is str, not a whole number", "demonstrations", k="4"
    ),
    "view of neutral nothing": view(r"rows=\(\) must not be empty", "neutral", rows=[]),
    "view of neutral text without prompts": view("rows\\[0\\]", "neutral", rows=[{"text": "a"}]),
    "view of a teacher that is text": view("model='gpt2' must be a model", "teacher", model="gpt2"),
    # SteeringVectorConfig and set_strength
    "more rows than the model is wide": row(
        "rank=33 must be at most 32, the width",
        lambda: get_peft_model(tiny(), SteeringVectorConfig(form="low_rank", rank=33)),
    ),
    "layers of a set of text": vector("layers=", layers={"a"}),
    "strength of text": row("strength='two' is neither a finite number", set_strength, steered(), "two"),
    "strength of None": row("strength=None is neither a finite number", set_strength, steered(), None),
    "strength of an unknown adapter": row("No steering vector 'x' to scale", set_strength, steered(), 1.0, "x"),
    "strength of a plain model": row("No steering vector to scale", set_strength, tiny(), 1.0),
    # directions and reading
    "direction of a path": row("direction='../lat' is not one of", directions.get, "../lat"),
    "direction of a private file": row("direction='_pca' is not one of", directions.get, "_pca"),
    "direction of nothing": row("No batches: at least one example", directions.compute, "lat", tiny(), []),
    "states without answers": row("An answer has no tokens", collect, tiny(), [WHOLE]),
    "states without labels": row("completion_mask nor labels", collect, tiny(), [BATCH]),
    "states of an unknown pool": row("pool='mean' is not one of", collect, tiny(), [WHOLE], pool="mean"),
    "states of a layer that is not there": row("layer 9 does not exist", collect, tiny(), [WHOLE], layers=9),
    "reading along nothing": row("zero or not finite", read, torch.zeros(8), PAIRS, PAIRS),
    # FrozenPrefix
    "memo of text": row("ram_gb='2' must be the RAM budget in GB", FrozenPrefix, ram_gb="2"),
    "memo of NaN": row("ram_gb=nan must be the RAM budget", FrozenPrefix, ram_gb=math.nan),
    "memo without end": row("disk_gb=inf must be the disk budget", FrozenPrefix, disk_gb=math.inf),
    "memo in a file": (
        (lambda lab: FrozenPrefix(folder=lab.file("memo", "x"))),
        "is a file. The cache needs a folder",
    ),
    # checkpoints
    "no checkpoint": resumed("No checkpoint .*nowhere", "nowhere"),
    "checkpoint without its end": resumed("has no trainer_state.json, which is written last", "checkpoint-2"),
    "checkpoint of another step": resumed("belongs to step 9, not to checkpoint-3", "checkpoint-3"),
    "checkpoint that is nested": resumed("trainer_state.json is damaged", "checkpoint-4"),
    "checkpoint that is no UTF-8": resumed("trainer_state.json is damaged", "checkpoint-5"),
    "checkpoint with other bytes": resumed("was changed after it was written", "checkpoint-6"),
    "checkpoint with a list of checksums": resumed("cannot be checked", "checkpoint-7"),
    "checkpoint with a bare pickle": resumed("optimizer.pt is damaged .*Delete the folder", "checkpoint-8"),
    # trainers
    "trainer with a loss of text": trainer("Unknown loss 'os'", loss="os"),
    "trainer with an adapter of text": trainer("peft_config='lora'.*SteeringVectorConfig", peft_config="lora"),
    "trainer with an adapter of a table": trainer("peft_config={.*SteeringVectorConfig", peft_config={"r": 8}),
    "trainer with a memo of text": trainer(
        "frozen_prefix='yes' must be True, False, None or a FrozenPrefix", frozen_prefix="yes"
    ),
    "trainer with views of text": trainer("views='good'", views="good"),
    "trainer with a view of a number": trainer("Unknown view 5", views={"good": 5}, loss="prompted"),
    "trainer with a bias of text": trainer(
        "inductive_biases='one_write' must be a mapping", inductive_biases="one_write"
    ),
    "trainer with biases of a number": trainer("inductive_biases=5", inductive_biases=5),
    "trainer whose loss misses its view": trainer(r"\['good'\] are not in views=", loss="prompted"),
    "trainer with a view that nobody sees": trainer(
        r"views \['good'\] are given, but DPO uses only \[\]",
        loss="dpo",
        views={"good": get_view("instruction", text="x")},
    ),
    "trainer on evaluation rows that are empty": trainer(
        "'chosen' is empty", eval_dataset=tiny_data.pairs(1).map(lambda row: {"chosen": ""})
    ),
    # scorers
    "scorer of an unknown kind": scorer("scorer.kind='clasifier' must be one of.*'classifier'", kind="clasifier"),
    "scorer of a path": scorer("scorer.kind='../rule' must be one of", kind="../rule"),
    "scorer with an unknown option": scorer("Unknown key 'patern' in .scorer.*'pattern'", kind="rule", patern="a"),
    "scorer with no expression": scorer("pattern: Field required", kind="rule"),
    "scorer with a broken expression": scorer("is not a regular expression", kind="rule", pattern="("),
    "scorer with a pattern of a number": scorer("pattern: Input should be a valid string", kind="rule", pattern=5),
    "scorer with a negative C": scorer("C: Input should be greater than 0", kind="classifier", C=-1),
    "judge at a file": scorer(
        "url: String should match", kind="judge", url="file:///etc/passwd", model="m", question="{answer}"
    ),
    "judge without an answer": scorer(
        "it must contain {answer}", kind="judge", url="http://h", model="m", question="?"
    ),
    "judge without its key": row(
        "environment variable 'NO_SUCH_KEY' is not set",
        fit,
        dict(kind="judge", url="http://h", model="m", question="{answer}", key="NO_SUCH_KEY"),
        None,
        None,
        None,
    ),
    "classifier of too few rows": row(
        "needs 8 rows or more", fit, {"kind": "classifier"}, tiny_data.pairs(3), None, None
    ),
    # augmentation
    "augmentation without a name": more("has no name. Set it to an augmenter", times=2),
    "augmentation of an unknown name": more("Unknown augmenter 'rewrite'.*Did you mean 'rewrites'", name="rewrite"),
    "augmentation of a path": more("Unknown augmenter '../os'", name="../os"),
    "augmentation of no times": more("augmentation.times=0 must be a whole number", name="templates", times=0),
    "augmentation of half times": more("augmentation.times=1.5", name="templates", times=1.5),
    "augmentation at a rate of text": more("rate='x'", name="perturbations", rate="x"),
    "augmentation at a rate of 1": more("rate=1 must be above 0 and at most 0.2", name="perturbations", rate=1),
    "augmentation by no function": more("function='f': write module:name", name="function", function="f"),
    "augmentation by a function of nothing": more("No module named 'nowhere'", name="function", function="nowhere:f"),
    "augmentation by a function that is none": more("is not a function", name="function", function="math:pi"),
    "augmentation at no temperature": more("temperature=0 must be above 0", name="rewrites", temperature=0),
    "augmentation at a temperature of text": more("temperature='hot'", name="rewrites", temperature="hot"),
    "augmentation of an unknown part": more(r"parts=\('promt',\)", name="rewrites", parts=["promt"]),
    "augmentation of rows without prompts": row(
        "Versions are made from prompts",
        grown,
        tiny_data.pairs(2).remove_columns("prompt"),
        get_augmenter("templates"),
        2,
    ),
    # statistics and chat
    "interval of nothing": row("0 differences", interval, []),
    "interval of NaN": row("1 of them not finite", interval, [1.0, math.nan]),
    "interval of an unknown method": row("method='bootstrap' must be", interval, [1.0, 2.0], method="bootstrap"),
    "interval of all": row("confidence=1.0 must be between 0 and 1", interval, [1.0, 2.0], confidence=1.0),
    "test of nothing": row("0 differences", p_value, []),
    "chat at strength NaN": row("strength=nan", Chat, None, None, math.nan, 5, 0.0),
    "chat without end": row("temperature=inf", Chat, None, None, 1.0, 5, math.inf),
}
