"""GRPO on completions that were drawn under other vectors than the trained one."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny_data import history, tokenizer, values
from tiny_models import steered, tiny, vector_of
from trl import GRPOConfig, GRPOTrainer

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.adapters.blocks import find_blocks
from steertune.trainers import SteeringGRPOTrainer
from steertune.trainers.rollouts import (
    Completion,
    DirectionScore,
    HotwireEngine,
    Request,
    RolloutError,
    Sampling,
    SteeredRollouts,
    TransformersEngine,
)

PROMPTS = Dataset.from_list([{"prompt": "dog cat "}, {"prompt": "cat dog "}] * 4)
DOG = "dog"


def sharp(seed: int = 0):
    """A tiny model whose head tells words apart, so that a vector can make it say one of them."""
    model = tiny(seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


def dogs(completions, **kwargs) -> list[float]:
    """The share of words that are `dog`."""
    return [text.split().count(DOG) / max(len(text.split()), 1) for text in completions]


def variety(completions, **kwargs) -> list[float]:
    """The share of words that are different."""
    return [len(set(text.split())) / max(len(text.split()), 1) for text in completions]


def make(folder, rollouts=None, trainer=SteeringGRPOTrainer, rewards=variety, model=None, adapter=None, **options):
    given = dict(
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=3, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=5, logging_steps=1, gradient_checkpointing=False, beta=0.0,
        save_strategy="no", dataloader_pin_memory=False, learning_rate=1e-3,
    )  # fmt: skip
    return trainer(
        model=sharp() if model is None else model,
        reward_funcs=rewards,
        args=GRPOConfig(str(folder), **{**given, **options}),
        train_dataset=PROMPTS,
        processing_class=tokenizer(),
        peft_config=SteeringVectorConfig() if adapter is None else adapter,
        rollout_func=rollouts,
    )


@pytest.fixture(scope="module")
def vector(tmp_path_factory) -> str:
    """A saved vector that points to the word `dog` in the head."""
    folder = tmp_path_factory.mktemp("vector")
    model = steered(sharp(), layers=1)
    head: Any = model.get_base_model().get_output_embeddings()
    direction = head.weight[tokenizer()(DOG)["input_ids"][0]].detach()
    for parameter in values(model).values():
        parameter.copy_(30 * direction / direction.norm())
    model.save_pretrained(str(folder))
    return str(folder)


def sampling(**options: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 5, "eos_token_id": [1], "pad_token_id": 0, **options})


def logps_by_hand(model, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_completion_is_drawn_and_scored_under_its_own_vectors(vector, temperature):
    loaded = PeftModel.from_pretrained(sharp(), vector).eval()
    v_D = vector_of(loaded).detach()
    strengths, prompts = [0.0, 1.0, -2.0], [[5, 6, 7], [8], [9, 5]]
    requests = [Request(prompt, {1: s * v_D}) for prompt, s in zip(prompts, strengths, strict=True)]
    completions = TransformersEngine(sharp(), rows=2)(requests, sampling(temperature=temperature))
    for prompt, strength, completion in zip(prompts, strengths, completions, strict=True):
        with set_strength(loaded, strength):
            expected = logps_by_hand(loaded, prompt, completion.tokens, temperature)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-5, rtol=1e-5)
        assert 1 not in completion.tokens[:-1]
    dog = tokenizer()(DOG)["input_ids"][0]
    drawn = TransformersEngine(sharp())([Request([5], {1: s * v_D}) for s in (0.0, 1.0) * 8], sampling())
    assert sum(c.tokens.count(dog) for c in drawn[1::2]) > 4 * sum(c.tokens.count(dog) for c in drawn[::2])


def test_an_engine_with_the_trained_vector_gives_the_numbers_of_the_stock_trainer(tmp_path):
    stock = make(tmp_path / "stock", trainer=GRPOTrainer)
    made = make(tmp_path / "ours", SteeredRollouts(engine=TransformersEngine(sharp())))
    for trainer in (stock, made):
        torch.manual_seed(0)
        trainer.train()
    names = ("loss", "reward", "entropy")
    assert history(made, *names) == [pytest.approx(logs, abs=1e-4) for logs in history(stock, *names)]
    for name, value in values(made.model).items():
        torch.testing.assert_close(value, values(stock.model)[name], atol=1e-5, rtol=1e-2)


def test_the_loss_is_the_clipped_ratio_to_what_was_drawn_from(vector, tmp_path):
    """`-Σ min(r A, clip(r, 1 - ε, 1 + ε) A) / tokens`, with r = adapter alone / adapter under the vector."""
    made = make(tmp_path, SteeredRollouts(vector, (0.0, 1.0)), loss_type="bnpo", epsilon=0.2, max_steps=1)
    steps = []
    plain = made.compute_loss

    def noted(model, inputs, *args, **kwargs):
        loss = plain(model, inputs, *args, **kwargs)
        steps.append((inputs, float(loss)))
        return loss

    made.compute_loss = noted
    made.train()
    [(inputs, loss)] = steps
    ratios, total, tokens = [], 0.0, 0
    for row in range(len(inputs["completion_ids"])):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        answer = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
        drawn = inputs["sampling_per_token_logps"][row][: len(answer)]
        # at the first step the trained vector is zero
        ratio = (logps_by_hand(sharp(), prompt, answer) - drawn).exp()
        advantage = inputs["advantages"][row]
        total -= float(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum())
        tokens += len(answer)
        ratios.append(ratio)
    assert loss == pytest.approx(total / tokens, abs=1e-4)
    # half of them come from the adapter alone, and the others do not (their order is TRL's)
    assert sum(bool((ratio - 1).abs().max() < 1e-4) for ratio in ratios) == len(ratios) / 2


def test_the_adapter_learns_to_do_without_the_vector_what_only_the_vector_did(vector, tmp_path):
    options = dict(rewards=dogs, max_steps=30, epsilon_high=5.0)
    before, after = [], []
    for rollouts, into in ((SteeredRollouts(vector, (0.0, 1.0)), after), (None, before)):
        made = make(tmp_path / str(len(after)), rollouts, learning_rate=1e-2, **options)
        made.train()
        drawn = TransformersEngine(made.model.eval())([Request([5, 6])] * 64, sampling())
        into.append(sum(dogs([tokenizer().decode(c.tokens) for c in drawn])) / 64)
    assert after[0] > before[0] + 0.2, (after, before)


def test_the_score_of_a_direction_is_the_mean_cosine_of_the_answers_states(vector):
    base = sharp()
    loaded = PeftModel.from_pretrained(base, vector).eval()  # its own vector does not count
    score = DirectionScore(loaded, tokenizer(), vector, rows=2)
    prompts, answers = ["dog cat ", "a cat", "the dog"], [[8, 9, 10], [9], [11, 7]]
    plain, direction = sharp(), vector_of(loaded).detach()
    for prompt, answer, value in zip(prompts, answers, score(prompts, answers), strict=True):
        ids = tokenizer()(prompt)["input_ids"]
        with torch.no_grad():
            hidden = plain(input_ids=torch.tensor([ids + answer]), output_hidden_states=True).hidden_states
        states = hidden[2][0, len(ids) :]  # behind block 1
        assert value == pytest.approx(float(torch.cosine_similarity(states, direction[None]).mean()), abs=1e-5)


def test_a_direction_is_a_reward_beside_others(vector, tmp_path):
    model = sharp()
    rewards = [variety, DirectionScore(model, tokenizer(), vector)]
    made = make(tmp_path, rewards=rewards, model=model, reward_weights=[1.0, -0.5])
    made.train()
    logs = made.state.log_history[0]
    total = logs["rewards/variety/mean"] - 0.5 * logs["rewards/direction_score/mean"]
    assert logs["reward"] == pytest.approx(total, abs=1e-5) and abs(logs["rewards/direction_score/mean"]) <= 1


def test_strengths_take_turns_within_a_group_on_every_process(vector):
    rollouts = SteeredRollouts(vector, (0.0, 1.0, 2.0))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), num_generations=6, accelerator=SimpleNamespace(process_index=0)
    )
    whole = rollouts._strengths(12, trainer)
    assert whole == [0.0, 1.0, 2.0] * 4
    halves = []
    for trainer.accelerator.process_index in (0, 1):
        halves += rollouts._strengths(6, trainer)
    assert halves == whole
    trainer.model.training = False
    assert rollouts._strengths(3, trainer) == [0.0] * 3


def test_evaluations_are_without_the_vector(vector, tmp_path):
    made = make(tmp_path, SteeredRollouts(vector, (1.0, 2.0)), eval_strategy="no", num_generations_eval=4)
    strengths = set()

    def noted(completions, strength, **kwargs):
        strengths.update(strength)
        return variety(completions)

    made.reward_funcs[0] = noted
    made.train()
    assert strengths == {1.0, 2.0}
    strengths.clear()
    made.evaluate(PROMPTS)
    assert strengths == {0.0}


# -- vLLM, through a stand-in ---------------------------------------------------------------------------------------


@dataclass
class SamplingParams:
    """The part of vLLM's class that is used."""

    max_tokens: int
    stop_token_ids: list[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    logprobs: int
    extra_args: dict[str, Any] = field(default_factory=dict)


class StandIn:
    """`vllm.LLM` with hotwire, over transformers: reads the same files and arguments, and answers in the same form."""

    def __init__(self, folder) -> None:
        self.folder, self.engine = folder, TransformersEngine(sharp())

    def generate(self, prompts, params):
        requests = [
            Request(prompt["prompt_token_ids"], self._vectors(json.loads(each.extra_args["hotwire"])))
            for prompt, each in zip(prompts, params, strict=True)
        ]
        first = params[0]
        drawn = self.engine(
            requests,
            Sampling(
                max_new_tokens=first.max_tokens,
                eos_token_id=first.stop_token_ids,
                pad_token_id=0,
                temperature=first.temperature,
                top_p=first.top_p,
                top_k=first.top_k,
                min_p=first.min_p or None,
                repetition_penalty=first.repetition_penalty,
            ),
        )
        return [SimpleNamespace(outputs=[self._output(completion)]) for completion in drawn]

    def _vectors(self, parts):
        files = {part["id"]: torch.load(self.folder / f"{part['id']}.pt", weights_only=True) for part in parts}
        return {part["layer"]: part["scale"] * files[part["id"]][part["layer"]] for part in parts}

    def _output(self, completion: Completion):
        logprobs = [{t: SimpleNamespace(logprob=p)} for t, p in zip(completion.tokens, completion.logps, strict=True)]
        return SimpleNamespace(token_ids=tuple(completion.tokens), logprobs=logprobs)


def test_vectors_travel_to_vllm_with_every_request(vector, tmp_path, monkeypatch):
    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    blocks = len(find_blocks(sharp()))
    histories = []
    for engine in (HotwireEngine(StandIn(tmp_path), tmp_path, blocks), TransformersEngine(sharp())):
        made = make(tmp_path / "run", SteeredRollouts(vector, (0.0, 1.0), engine))
        torch.manual_seed(0)
        made.train()
        histories.append(history(made, "loss", "reward"))
    assert histories[0] == [pytest.approx(logs, abs=1e-6) for logs in histories[1]]
    # at strength 0 the first step, whose trained vector is zero, has no file; then one per step and strength
    assert len([*tmp_path.glob("*.pt")]) == 2 * 3 - 1 and not [*tmp_path.glob("*.part")]
    with pytest.raises(ValueError, match="Leave them out"):
        HotwireEngine(None, tmp_path, blocks)([Request([1])], sampling(more={"num_beams": 2}))


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strengths=()), "at least one"),
        (dict(strengths=(0.0, float("nan"))), "finite"),
        (dict(strengths=(0.0, 0.0)), "all 0"),
        (dict(vector=None), "engine=None"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SteeredRollouts(**{"vector": "folder", **options})


def test_what_does_not_fit_the_trainer(vector, tmp_path):
    with pytest.raises(RolloutError, match="num_generations=4"):
        make(tmp_path, SteeredRollouts(vector, (0.0, 1.0, 2.0)))
    with pytest.raises(RolloutError, match="missing is not an adapter folder"):
        make(tmp_path, SteeredRollouts(str(tmp_path / "missing")))
    with pytest.raises(RolloutError, match="not the adapter's base model"):
        make(tmp_path, SteeredRollouts(vector), model=sharp(seed=1))
    steered(sharp(), layers=1, site="mlp").save_pretrained(str(tmp_path / "mlp"))
    with pytest.raises(RolloutError, match="site='block'"):
        make(tmp_path, SteeredRollouts(str(tmp_path / "mlp")))
    with pytest.raises(RolloutError, match="takes only vectors with a request"):
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        make(tmp_path, SteeredRollouts(vector, engine=TransformersEngine(sharp())), adapter=lora)


def test_a_stock_trainer_does_not_take_the_completions_for_its_own(vector, tmp_path):
    with pytest.raises(RolloutError, match="Use SteeringGRPOTrainer"):
        make(tmp_path, SteeredRollouts(vector), trainer=GRPOTrainer).train()


def test_a_lora_can_learn_from_steered_completions(vector, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    made = make(tmp_path, SteeredRollouts(vector), adapter=lora)
    made.train()
    assert any(p.any() for name, p in made.model.named_parameters() if "lora_B" in name)
