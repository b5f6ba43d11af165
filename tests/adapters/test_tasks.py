"""Classifiers, reward models, question answering, feature extraction, and modules that are not transformers'."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from tiny_data import pairs, tokenizer
from tiny_models import fill, tiny, tokens, vector_of
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from trl import RewardConfig, RewardTrainer

from steertune.adapters import SteeringVectorConfig

HEADS = {
    "SequenceClassification": (AutoModelForSequenceClassification, "SEQ_CLS", "score"),
    "TokenClassification": (AutoModelForTokenClassification, "TOKEN_CLS", "score"),
    "QuestionAnswering": (AutoModelForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
}


def classifier(kind: str = "SequenceClassification", model_type: str = "llama", **changes) -> nn.Module:
    """A tiny model with a head."""
    config = tiny(model_type).config
    config.num_labels = 1
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return HEADS[kind][0].from_config(config).eval()


@pytest.mark.parametrize("asked", [True, False], ids=["task named", "task found"])
@pytest.mark.parametrize("kind", HEADS)
def test_models_with_a_head_are_wrapped_as_peft_does(kind, asked, tmp_path):
    _, task, head = HEADS[kind]
    config = SteeringVectorConfig(layers=[1, 2], **({"task_type": task} if asked else {}))
    base = classifier(kind)
    model = get_peft_model(base, config)
    assert type(model).__name__ == f"PeftModelFor{kind}" and config.task_type == task
    before = base(tokens()).logits if hasattr(base(tokens()), "logits") else base(tokens()).start_logits
    assert any(head in name for name, p in model.named_parameters() if p.requires_grad)
    fill(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 1
    model.eval()
    after = model(tokens())[0]
    assert not torch.allclose(after, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(kind), tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(tokens())[0], after)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "gemma2"])
def test_reward_trainer_trains_and_saves_the_score(model_type, tmp_path):
    """Only `peft_config=` was added to TRL's example."""
    data = pairs(8)
    args = RewardConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], bf16=False,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer = RewardTrainer(
        classifier(model_type=model_type, pad_token_id=0), args=args, train_dataset=data, eval_dataset=data,
        processing_class=tokenizer(), peft_config=SteeringVectorConfig(),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert {"steering_vector_v" in name for name in moved} == {True, False}
    assert all("steering_vector_v" in name or "score.modules_to_save" in name for name in moved)
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(classifier(model_type=model_type, pad_token_id=0), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(tokens()).logits, trainer.model.eval()(tokens()).logits)


def test_auto_peft_model_finds_the_class(tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SteeringVectorConfig())
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens()).logits, model.eval()(tokens()).logits)


@pytest.mark.parametrize("asked", [True, False], ids=["task named", "task found"])
@pytest.mark.parametrize("positions", ["completion", "prompt", "last_prompt"])
@pytest.mark.parametrize("kind", HEADS)
def test_positions_of_a_prompt_are_refused(kind, positions, asked):
    config = SteeringVectorConfig(positions=positions, **({"task_type": HEADS[kind][1]} if asked else {}))
    with pytest.raises(ValueError, match=f"positions='{positions}': .*For{kind}.*without a prompt.*positions='all'"):
        get_peft_model(classifier(kind), config)


def test_feature_extraction():
    config = SteeringVectorConfig(task_type="FEATURE_EXTRACTION", layers=1, init="random")
    model = get_peft_model(AutoModel.from_config(tiny().config).eval(), config)
    with model.disable_adapter():
        before = model(tokens()).last_hidden_state
    assert not torch.allclose(model(tokens()).last_hidden_state, before)
    with pytest.raises(ValueError, match="positions='prompt'.*FEATURE_EXTRACTION"):
        get_peft_model(tiny(), SteeringVectorConfig(task_type="FEATURE_EXTRACTION", positions="prompt"))


def test_encoders_with_a_head():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    base = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", vocab_size=64, **sizes))
    model = get_peft_model(base, SteeringVectorConfig(layers=1))
    assert model.peft_config["default"].modules_to_save and vector_of(model).shape == (16,)


def test_a_causal_model_is_wrapped_as_before(tmp_path):
    config = SteeringVectorConfig()
    assert config.to_dict()["task_type"] is None
    model = get_peft_model(tiny(), config)
    assert isinstance(model, peft.PeftModelForCausalLM) and config.task_type == "CAUSAL_LM"
    model.save_pretrained(tmp_path)
    assert isinstance(PeftModel.from_pretrained(tiny(), tmp_path), peft.PeftModelForCausalLM)
    inside = tiny()
    inside.add_adapter(SteeringVectorConfig())
    assert inside.peft_config["default"].task_type == "CAUSAL_LM"


def test_a_configuration_can_be_written_before_it_meets_a_model(tmp_path):
    SteeringVectorConfig().save_pretrained(tmp_path)
    config = SteeringVectorConfig.from_pretrained(str(tmp_path))
    assert isinstance(get_peft_model(tiny(), config), peft.PeftModelForCausalLM)


# -- modules that are not transformers' -----------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.relu = nn.Linear(10, 20), nn.ReLU()
        self.body = nn.Sequential(nn.Linear(20, 12), nn.LayerNorm(12), nn.Tanh())
        self.lin1 = nn.Linear(12, 2)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.body(self.relu(self.lin0(X))))


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


@pytest.mark.parametrize("target, widths", [("lin0", [20]), ("body", [12]), ("lin0|body", [20, 12]), (".*1", [12, 2])])
def test_a_plain_module_is_steered_where_target_modules_say(target, widths, tmp_path):
    model = get_peft_model(mlp(), SteeringVectorConfig(target_modules=target, init="random"))
    vectors = [p for name, p in model.named_parameters() if "steering_vector" in name]
    assert [len(v) for v in vectors] == widths and type(model) is PeftModel
    numbers = torch.ones(3, 10)
    steered_ = model(numbers)
    assert not torch.allclose(steered_, mlp()(numbers))
    steered_.sum().backward()
    assert all(v.grad is not None for v in vectors)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    torch.testing.assert_close(loaded(numbers), steered_)
    assert torch.equal(loaded.unload()(numbers), mlp()(numbers))


def test_a_plain_module_of_an_unknown_width_is_refused():
    with pytest.raises(ValueError, match=r"Cannot determine the output width of relu \(ReLU\).*nn.Linear"):
        get_peft_model(mlp(), SteeringVectorConfig(target_modules="relu"))


# -- init_weights ---------------------------------------------------------------------------------------------------


def test_init_weights_false_starts_with_an_effect():
    config = SteeringVectorConfig(init_weights=False, layers=1)
    assert config.init == "random" and SteeringVectorConfig(**config.to_dict()).init == "random"
    model = get_peft_model(tiny(), config)
    assert vector_of(model).norm().item() == pytest.approx(1.0)
    with model.disable_adapter():
        before = model(tokens()).logits
    assert not torch.allclose(model(tokens()).logits, before)
    assert SteeringVectorConfig(init_weights=True).init == "zeros"
    SteeringVectorConfig(init_weights=False, norm="fixed", norm_value=1.0)


def test_init_weights_beside_another_start_is_refused():
    with pytest.raises(ValueError, match="init_weights=False starts from a random direction, but init='mean_diff"):
        SteeringVectorConfig(init_weights=False, init="mean_difference")
    with pytest.raises(ValueError, match="init_weights='no' must be bool, got str"):
        SteeringVectorConfig(init_weights="no")
