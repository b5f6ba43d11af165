"""With `peft_config=None` and no loss, our trainers are their parents, bit for bit, whatever is asked of them.

TRL's and transformers' source distributions hold no tests of their trainers, so what those tests ask for is asked here
of both side by side: what is logged, every weight, evaluations, predictions, callbacks and files are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_data import TRAINERS, arguments, conversational, demonstrations, history, pairs, tokenizer
from tiny_models import tiny
from transformers import EarlyStoppingCallback
from upstream import PARENTS, tokenised

_EVERY = dict(eval_strategy="steps", eval_steps=1)
_TEXTS = [{"text": f"{row['prompt']}{row['completion']}"} for row in demonstrations(8)]


def _accuracy(seen: Any) -> dict[str, float]:
    logits = seen.predictions[0] if isinstance(seen.predictions, tuple) else seen.predictions
    return {"right": float((np.asarray(logits).argmax(-1)[:, :-1] == seen.label_ids[:, 1:]).mean())}


def _smoothed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.3)


def _sgd() -> dict[str, Any]:
    model = tiny()
    return dict(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


# kind, training arguments, what the constructor is given besides (made anew for each of the two trainers)
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "plain": ("plain", {}, dict),
    "plain, accumulated, checkpointed activations": (
        "plain", dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, activation_checkpointing=True),
        dict),
    "plain, bf16, weight decay, cosine, warmup": (
        "plain", dict(bf16=True, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=1), dict),
    "plain, label smoothing, Adafactor, clipped": (
        "plain", dict(label_smoothing_factor=0.1, optim="adafactor", max_grad_norm=0.1), dict),
    "plain, epochs, last rows dropped, other seeds": (
        "plain", dict(max_steps=-1, num_train_epochs=2, dataloader_drop_last=True, per_device_train_batch_size=3,
                      seed=7, data_seed=8), dict),
    "plain, noise on embeddings, tokens counted": (
        "plain", dict(neftune_noise_alpha=5.0, include_num_input_tokens_seen="all"), dict),
    "plain, evaluated on the way with metrics": (
        "plain", dict(**_EVERY, eval_accumulation_steps=1, batch_eval_metrics=False),
        lambda: dict(compute_metrics=_accuracy)),
    "plain, a model that is made when training begins": (
        "plain", {}, lambda: dict(model=None, model_init=lambda: tiny())),
    "plain, an optimiser and a loss of one's own": (
        "plain", {}, lambda: dict(**_sgd(), compute_loss_func=_smoothed)),
    "plain, the best model, stopped early": (
        "plain", dict(**_EVERY, max_steps=4, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
                      metric_for_best_model="loss", save_total_limit=1, learning_rate=0.5),
        lambda: dict(callbacks=[EarlyStoppingCallback(1)])),
    "SFT": ("sft", {}, dict),
    "SFT, packed text": ("sft", dict(packing=True, max_length=8), lambda: dict(data=Dataset.from_list(_TEXTS))),
    "SFT, accumulated, evaluated": (
        "sft", dict(**_EVERY, gradient_accumulation_steps=2, per_device_train_batch_size=2), dict),
    "SFT, conversations": ("sft", {}, lambda: dict(data=conversational(demonstrations()))),
    "SFT, prompts trained too, cut, shuffled": (
        "sft", dict(completion_only_loss=False, max_length=4, shuffle_dataset=True), dict),
    "SFT, DFT's loss, bf16": ("sft", dict(loss_type="dft", bf16=True), dict),
    "SFT, streamed": ("sft", {}, lambda: dict(data=demonstrations().to_iterable_dataset())),
    "SFT, several sets to evaluate on": (
        "sft", _EVERY, lambda: dict(eval_dataset={"a": demonstrations(3, seed=1), "b": demonstrations(3, seed=2)})),
    "DPO": ("dpo", {}, dict),
    "DPO, its reference given": ("dpo", {}, lambda: dict(ref_model=tiny(seed=3))),
    "DPO, references computed before, evaluated": ("dpo", dict(precompute_ref_log_probs=True, **_EVERY), dict),
    "DPO, IPO and hinge, weighted": ("dpo", dict(loss_type=["ipo", "hinge"], loss_weights=[0.3, 0.7], beta=0.3), dict),
    "DPO, robust, smoothed, accumulated": (
        "dpo", dict(loss_type="robust", label_smoothing=0.2, gradient_accumulation_steps=2,
                    per_device_train_batch_size=2), dict),
    "DPO, WPO weights, length desensitised": ("dpo", dict(use_weighting=True, ld_alpha=0.5), dict),
    "DPO, reference follows": (
        "dpo", dict(sync_ref_model=True, ref_model_sync_steps=1), lambda: dict(ref_model=tiny(seed=3))),
    "DPO, conversations, cut": ("dpo", dict(max_length=9), lambda: dict(data=conversational(pairs()))),
}  # fmt: skip


def make(cls: type, kind: str, folder: Path, changes: dict[str, Any], own: dict[str, Any], **ours: Any) -> Any:
    """A trainer of a case: ours or its parent."""
    data = demonstrations if kind == "sft" else pairs
    given: dict[str, Any] = dict(model=tiny(), processing_class=tokenizer(), eval_dataset=data(3, seed=9), data=data())
    if kind == "dpo":
        given["ref_model"] = tiny()
    if kind == "plain":
        given |= tokenised()
        given["eval_dataset"] = given["data"].select(range(4))
    given |= own
    options = {"learning_rate": 0.001, **changes}
    return cls(args=arguments(kind, folder, **options), train_dataset=given.pop("data"), **given, **ours)


def look(made: Any, kind: str, resume: bool | None = None) -> dict[str, Any]:
    """Train and evaluate; what is to be the same to the last bit."""
    made.train(resume_from_checkpoint=resume)
    measured = made.evaluate()
    seen: dict[str, Any] = {
        "logged": history(made),
        "measured": {k: v for k, v in measured.items() if not k.endswith(("runtime", "per_second"))},
        "callbacks": [type(callback).__name__ for callback in made.callback_handler.callbacks],
        "columns": list(getattr(made.train_dataset, "column_names", None) or []),
        "weights": {name: p.detach().clone() for name, p in made.model.named_parameters()},
    }
    if kind == "plain":
        predicted = made.predict(made.train_dataset).predictions
        seen["weights"] |= {"predicted": torch.tensor(np.asarray(predicted))}
    made.save_model(str(Path(made.args.output_dir) / "saved"))
    seen["files"] = sorted(str(f.relative_to(made.args.output_dir)) for f in Path(made.args.output_dir).rglob("*"))
    return seen


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """What is not the same."""
    found = [key for key in one if key != "weights" and one[key] != two[key]]
    names = one["weights"].keys() | two["weights"].keys()
    return found + [
        name
        for name in sorted(names)
        if name not in one["weights"]
        or name not in two["weights"]
        or not torch.equal(one["weights"][name], two["weights"][name])
    ]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", CASES)
def test_it_is_its_parent(case: str, tmp_path: Path) -> None:
    kind, changes, own = CASES[case]
    ours = look(make(TRAINERS[kind], kind, tmp_path / "ours", changes, own(), peft_config=None), kind)
    theirs = look(make(PARENTS[kind], kind, tmp_path / "theirs", changes, own()), kind)
    assert differences(ours, theirs) == []
    assert len(theirs["logged"]) >= 3 and theirs["logged"][0].get("grad_norm", 1) > 0
    start = dict(tiny().named_parameters())
    assert any(not torch.equal(value, start[name]) for name, value in theirs["weights"].items() if name in start)


@pytest.mark.parametrize("kind", PARENTS)
def test_it_resumes_as_its_parent(kind: str, tmp_path: Path) -> None:
    changes = dict(save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    seen = []
    for name, trainer_class, extra in (("ours", TRAINERS[kind], {"peft_config": None}), ("theirs", PARENTS[kind], {})):
        make(trainer_class, kind, tmp_path / name, {**changes, "max_steps": 2}, {}, **extra).train()
        seen.append(look(make(trainer_class, kind, tmp_path / name, changes, {}, **extra), kind, resume=True))
    assert differences(*seen) == []
    assert [line["step"] for line in seen[0]["logged"] if "loss" in line] == [1, 2, 3]


def test_a_planted_difference_is_seen(tmp_path: Path) -> None:
    one, two = (look(make(PARENTS["sft"], "sft", tmp_path / str(seed), dict(seed=seed), {}), "sft") for seed in (1, 2))
    assert {"logged", "measured"} <= set(differences(one, two))
    moved = {**one, "weights": {**one["weights"], "lm_head.weight": one["weights"]["lm_head.weight"] + 1e-7}}
    assert differences(one, moved) == ["lm_head.weight"]
