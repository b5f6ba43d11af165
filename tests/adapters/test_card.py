"""Model cards: what they say, what upstream does with them, and what is pushed to the Hub (which is not called)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_data
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel
from tiny_models import steered, tiny
from transformers.utils import hub

from steertune.adapters.card import SAFETY, Card, write_card
from steertune.recipes import train
from steertune.recipes.lab.arm import make_arm

KNOWN = Card("Careful", "It is careful.", "Is it?", "8 pairs.", "By hand.", "| a | b |", "None seen.", "Strength 2.")


@pytest.fixture
def folder(tmp_path) -> Path:
    steered(layers=[1, 2]).save_pretrained(tmp_path / "vector")
    return tmp_path / "vector"


def test_a_card_says_what_is_known(folder):
    write_card(folder, KNOWN)
    card: Any = ModelCard.load(folder / "README.md")
    for text in ("# Careful", "It is careful.", "Is it?", "8 pairs.", "By hand.", "| a | b |", "None seen.",
                 "Strength 2.", SAFETY, "`layers=[1, 2]`", "`llama` of width 32 and 4 layers", "peft 0.", "torch 2.",
                 "steertune "):  # fmt: skip
        assert text in card.text, text
    assert card.data.library_name == "peft" and "steering-vector" in card.data.tags
    assert card.data.pipeline_tag == "text-generation", "PEFT's metadata are kept"


def test_a_card_says_what_is_not_known(folder):
    write_card(folder, Card())
    text = (folder / "README.md").read_text()
    assert text.count("Not measured.") == 3 and "Not stated." in text
    assert "[More Information Needed]" not in text


def test_peft_keeps_the_text_when_it_saves_again(folder):
    write_card(folder, KNOWN)
    PeftModel.from_pretrained(tiny(), str(folder)).save_pretrained(folder)
    assert "It is careful." in (folder / "README.md").read_text()
    write_card(folder, Card("Second"))
    assert "# Second" in (folder / "README.md").read_text(), "a card of ours is written anew"


def test_a_template_that_somebody_began_to_fill_in_is_left_as_it_is(folder):
    template = (folder / "README.md").read_text()
    (folder / "README.md").write_text(template.replace("[More Information Needed]", "My own words.", 1))
    assert write_card(folder, KNOWN) is None
    assert "My own words." in (folder / "README.md").read_text()


def test_what_somebody_wrote_is_left_as_it_is(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    assert write_card(folder, KNOWN) is None
    assert "# Mine" in (folder / "README.md").read_text()
    assert write_card(folder, KNOWN, anyway=True) is not None
    kept: Any = ModelCard.load(folder / "README.md").data
    assert kept.license == "mit"


def test_no_path_of_this_machine_stands_in_a_card(tmp_path):
    base = tiny()
    base.save_pretrained(tmp_path / "my-base")
    model = steered(base)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "my-base")
    model.save_pretrained(tmp_path / "vector")
    write_card(tmp_path / "vector", KNOWN)
    text = (tmp_path / "vector" / "README.md").read_text()
    assert "my-base" in text and str(tmp_path) not in text


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_card(tmp_path, KNOWN)


# -- trainers ---------------------------------------------------------------------------------------------------------


def test_a_trainer_writes_what_it_knows(tmp_path):
    trainer = tiny_data.trained("dpo", tmp_path / "run", loss="dpo")
    trainer.card = Card(behaviour="It is careful.")
    trainer.save_model(str(tmp_path / "vector"))
    text = (tmp_path / "vector" / "README.md").read_text()
    assert "It is careful." in text and "8 preference pairs" in text
    assert "`SteeringDPOTrainer` with the loss DPO(" in text and "3 steps of 4 examples, learning rate 0.05" in text
    assert "# vector" in text


def test_a_lora_and_full_finetuning(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tiny_data.trainer("sft", tmp_path / "run", loss="cross_entropy", peft_config=lora).save_model(
        str(tmp_path / "lora")
    )
    text = (tmp_path / "lora" / "README.md").read_text()
    assert "A PEFT adapter (LORA)" in text and "set_strength" not in text
    whole = tiny_data.trainer("sft", tmp_path / "run", loss="cross_entropy", peft_config=None)
    whole.save_model(str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "README.md").exists()


class Hub:
    """What would be uploaded, in place of the Hub."""

    def __init__(self, monkeypatch):
        self.files: dict[str, str] = {}
        self.card: ModelCard | None = None
        monkeypatch.setattr(HfApi, "create_repo", self.create)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)
        monkeypatch.setattr(HfApi, "create_commit", self.commit)
        monkeypatch.setattr(hub.ModelCard, "load", self.load)

    def create(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def upload(self, *, repo_id, folder_path, **_):
        self.files = {
            file.name: file.read_text(encoding="utf-8")
            for file in Path(folder_path).iterdir()
            if file.suffix in (".md", ".json")
        }

    def commit(self, repo_id, operations, **_):
        for operation in operations:
            if operation.path_in_repo.endswith(".md"):
                self.files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_text(encoding="utf-8")

    def load(self, repo_id_or_path, **_):
        if Path(str(repo_id_or_path)).exists():
            return ModelCard(Path(str(repo_id_or_path)).read_text(encoding="utf-8"))
        if self.card is None:
            raise EntryNotFoundError("there is no card")
        return self.card


@pytest.fixture
def upstream(monkeypatch) -> Hub:
    return Hub(monkeypatch)


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
def test_push_to_hub_of_a_trainer_pushes_our_card(kind, tmp_path, upstream):
    own = dict(data_collator=None) if kind == "plain" else {}
    trainer = tiny_data.trainer(kind, tmp_path / "my-vector", loss="cross_entropy", hub_model_id="me/my-vector", **own)
    trainer.card = KNOWN
    trainer.push_to_hub()
    pushed = upstream.files["README.md"]
    assert "It is careful." in pushed and SAFETY in pushed
    assert "It has been trained using [TRL]" not in pushed and "More information needed" not in pushed
    data: Any = ModelCard(pushed).data
    assert data.library_name == "peft" and "steering-vector" in data.tags
    if kind != "plain":
        assert kind in data.tags, "TRL's metadata are kept"
    assert json.loads(upstream.files["adapter_config.json"])["peft_type"] == "STEERING_VECTOR"


def test_push_to_hub_of_a_peft_model_replaces_the_card_unless_it_is_on_the_hub(folder, upstream):
    """Upstream's doing, and why the README says to push the folder or through the trainer."""
    write_card(folder, KNOWN)
    ours = ModelCard.load(folder / "README.md")
    model = PeftModel.from_pretrained(tiny(), str(folder))
    model.push_to_hub("me/my-vector")
    assert "It is careful." not in upstream.files["README.md"]
    upstream.card = ours
    model.push_to_hub("me/my-vector")
    assert "It is careful." in upstream.files["README.md"]


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_the_recipe_puts_its_measurements_in_the_card(tmp_path):
    tiny_data.save_model(tmp_path / "model", max_position_embeddings=512)
    task = tiny_data.save_task(tmp_path / "task", train=tiny_data.pairs(8, 5), test=tiny_data.pairs(8, 4))
    arm = make_arm({
        "name": "mine", "model": {"name": str(tmp_path / "model"), "threads": 1},
        "data": {"name": task, "train": 4, "test": 4},
        "trainer": {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True},
        "evaluation": {"generations": 0}, "output": {"folder": str(tmp_path / "run")},
        "card": {"behaviour": "It stays.", "problem": "Does it stay?", "safety": "Ask first."},
    })  # fmt: skip
    train.run(arm)
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    for said in ("# mine, task", "It stays.", "Does it stay?", "Ask first.", "On 4 held-out examples:",
                 "| held-out pair accuracy |", "4 training examples of `task`", "nats per token",
                 "| strength 0 |"):  # fmt: skip
        assert said in text, said
    assert str(tmp_path) not in text
