"""Compute a parent's own loss with the loss of ours that equals it, and log it under the parent's names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ..adapters.blocks import text_config
from ..adapters.observing import base_model
from ..losses import Loss, get_loss
from .arguments import unused_by
from .batch import Batch
from .model_at import ModelAt
from .types import SteeringRun

_DPO_TYPES = {"sigmoid": "dpo", "ipo": "ipo"}  # TRL's name of a loss -> the file of ours that computes the same


def parents_loss(trainer: SteeringRun) -> Loss | None:
    """Find the loss of this library that equals the parent's own under its arguments; None if no loss does.

    Args:
        trainer: The trainer, constructed by its parent.
    """
    args: Any = trainer.args
    base = base_model(trainer.model)
    loss = _loss_of_type(trainer, base)
    equal = (
        loss is not None
        and not unused_by(loss, args)
        and (not isinstance(args, DPOConfig) or args.disable_dropout)  # TRL's reference has dropout, ours has none
        and not args.use_liger_kernel
        and trainer.compute_loss_func is None
        and trainer.accelerator.parallelism_config is None  # the parent reduces its loss over sequence shards
        and isinstance(trainer.processing_class, PreTrainedTokenizerBase | None)  # not an image processor
        # the parent adds the routers' auxiliary loss
        and "output_router_logits" not in inspect.signature(type(base).forward).parameters
    )
    return loss if equal else None


def _loss_of_type(trainer: SteeringRun, base: Any) -> Loss | None:
    args: Any = trainer.args
    if isinstance(trainer, DPOTrainer) and isinstance(args, DPOConfig):
        kind, *others = args.loss_type
        return get_loss(_DPO_TYPES[kind], beta=args.beta) if kind in _DPO_TYPES and not others else None
    if isinstance(trainer, SFTTrainer) and isinstance(args, SFTConfig):
        return get_loss("cross_entropy") if args.loss_type == "nll" else None
    # a model may name another loss in its configuration
    causal = type(base).__name__.endswith("ForCausalLM") and getattr(text_config(base), "loss_type", None) is None
    return get_loss("cross_entropy") if causal else None


def parents_mean(values: Tensor, loss: Loss, batch: Batch, items: Tensor | int | None, trainer: Trainer) -> Any:
    """Average a micro-batch's values as the parent does.

    Args:
        values: The loss's values.
        loss: The loss.
        batch: The micro-batch.
        items: Number of labels in the whole optimiser step, if the parent counts them; None: it averages the
            micro-batch, and `Trainer` the micro-batches.
        trainer: The trainer.
    """
    if items is None or loss.needs.unit == "example":
        return values.sum() / torch.as_tensor(batch.count(loss.needs.unit)).clamp(min=1)
    processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return values.sum() / torch.as_tensor(items).clamp(min=1) * processes  # a step without a label counts 0


class ParentsMetrics:
    """The metrics that TRL logs with its losses, under its names; it logs their averages over micro-batches.

    Args:
        accelerator: The trainer's; it gathers values from all processes.
        beta: Scale of the rewards of pairs.
    """

    def __init__(self, accelerator: Any, beta: float = 1.0) -> None:
        self._accelerator, self.beta = accelerator, beta
        self._trained_tokens = 0  # without padding
        # entropy, whether it was the best guess, and mean logit of every label, each (labels,)
        self._label_values: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def look(self, logits: Tensor, answers: Tensor) -> None:
        """Keep three numbers per label: its distribution's entropy, whether it was the best guess, and the mean logit.

        Args:
            logits: `(labels, vocabulary)`.
            answers: The labels, `(labels,)`.
        """
        entropies, guesses = [], []
        for part in logits.split(64):  # whole copies of the logits would cost more than what is computed from them
            top, best = part.max(-1)
            shifted = part - top[:, None]
            weights = shifted.exp()  # (labels, vocabulary), the largest 1
            total = weights.sum(-1)
            entropies.append(total.log() - torch.linalg.vecdot(weights, shifted) / total)
            guesses.append(best)
        self._label_values = torch.cat(entropies), (torch.cat(guesses) == answers).float(), logits.mean(-1)

    @torch.no_grad()
    def note(self, log: dict[str, list[float]], at: ModelAt, batch: Batch, training: bool) -> None:
        """Add a micro-batch's numbers to the parent's log.

        Args:
            log: Name -> values since the parent last logged.
            at: The model's outputs on the batch.
            batch: The batch.
            training: Whether this is a training step.
        """
        for name, value in (self._token_metrics() | (self._pair_metrics(at) if batch.pairs else {})).items():
            log.setdefault(name, []).append(value)
        if training:
            ids, mask = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
            tokens = torch.ones_like(ids).sum() if mask is None else mask.sum()
            self._trained_tokens += int(self._accelerator.gather(tokens).sum())
        log["num_tokens"] = [float(self._trained_tokens)]

    def _token_metrics(self) -> dict[str, float]:
        entropy, best, _ = self._label_values or (torch.zeros(0),) * 3
        return {"entropy": self._average(entropy), "mean_token_accuracy": self._average(best)}

    def _pair_metrics(self, at: ModelAt) -> dict[str, float]:
        policy, base = at(1.0), at(0.0)
        sides = {"chosen": (policy.chosen, base.chosen), "rejected": (policy.rejected, base.rejected)}
        rewards = {side: self.beta * (now.logps - before.logps) for side, (now, before) in sides.items()}  # (pairs,)
        _, best, logits = self._label_values or (torch.zeros(0),) * 3
        first = int(policy.chosen.mask.sum())  # labels come row after row, chosen answers first
        return {
            **{f"rewards/{side}": self._average(reward) for side, reward in rewards.items()},
            "rewards/accuracies": self._average((rewards["chosen"] > rewards["rejected"]).float()),
            "rewards/margins": self._average(rewards["chosen"] - rewards["rejected"]),
            **{f"logps/{side}": self._average(now.logps) for side, (now, _) in sides.items()},
            "logits/chosen": self._average(logits[:first]),
            "logits/rejected": self._average(logits[first:]),
            "mean_token_accuracy": self._average(best[:first]),  # of the chosen answers
        }

    def _average(self, values: Tensor) -> float:
        """Mean over the values of all processes, which may have different numbers of them."""
        total = torch.stack([values.detach().sum(), values.new_tensor(float(len(values)))])[None]
        total, count = self._accelerator.gather(total).sum(dim=0)
        return float(total / count.clamp_min(1))
