"""Bugs that this field has had, each as one edit of our source, and how to put one in.

A fault is text for text: where the source no longer holds `old` exactly once, `source` says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType

from paths import ROOT

PACKAGE = "steertune"


@dataclass(frozen=True)
class Fault:
    """One bug.

    Attributes:
        name: What is wrong then.
        kind: Its class.
        module: Where it is, below the package.
        old: Text of the source.
        new: What a bug makes of it.
        tests: The test file that should notice.
        which: Its tests, as for `pytest -k`.
    """

    name: str
    kind: str
    module: str
    old: str
    new: str
    tests: str
    which: str

    @property
    def source(self) -> str:
        """The module's source with the bug in it.

        Raises:
            ValueError: the text to be replaced is not there exactly once.
        """
        text = (ROOT / f"{self.module.replace('.', '/')}.py").read_text()
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(f"{self.name!r}: {self.old!r} stands {text.count(self.old)} times in {self.module}.")
        return text.replace(self.old, self.new)


class _Broken(SourceFileLoader):
    source = ""

    def get_code(self, fullname: str) -> CodeType:
        """Of the broken source; no cached bytecode is read or written."""
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != f"{PACKAGE}.{self.fault.module}":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(spec for spec in others if spec is not None)
        spec.loader = _Broken(fullname, str(spec.origin))
        spec.loader.source = self.fault.source
        return spec


def seed(fault: Fault) -> None:
    """Put a bug into this process, for good.

    Raises:
        RuntimeError: the package is imported already.
    """
    if any(name.startswith(f"{PACKAGE}.") for name in sys.modules):
        raise RuntimeError(f"{PACKAGE} is imported already: a fault must come first.")
    sys.meta_path.insert(0, _Finder(fault))


FAULTS = [
    Fault(
        "labels are off by one", "label masks", "trainers.batch",
        "return on_host(self.labels)[:, 1:]", "return on_host(self.labels)[:, :-1]",
        "trainers/test_model_at", "full_computation",
    ),
    Fault(
        "prompt tokens are trained", "label masks", "trainers.batch",
        'inputs["input_ids"], inputs["completion_mask"]', 'inputs["input_ids"], inputs["attention_mask"]',
        "trainers/test_equal_upstream", "cross_entropy_on_pairs",  # of DPO's margin a shared prompt cancels
    ),
    Fault(
        "a doubled BOS passes", "double BOS", "trainers.row_checks",
        "if limits.bos is not None and list(ids[:2]) == [limits.bos, limits.bos]:", "if False:",
        "trainers/test_bad_input", "refused_before_training and bos",
    ),
    Fault(
        "the reference is the model itself", "DPO reference", "trainers.model_at",
        "with reference_adapter(self.unwrapped), evaluating(self.unwrapped):", "with evaluating(self.unwrapped):",
        "trainers/test_model_at", "at_0 or none_at_0",
    ),
    Fault(
        "the reference of a continued adapter is the base", "DPO reference", "trainers.model_at",
        "REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None", "None",
        "trainers/test_promises", "starts_at_ln_2 or reference_copy",
    ),
    Fault(
        "the reference copy stays as it was made", "DPO reference", "trainers.reference",
        'REFERENCE_ADAPTER}.")).copy_(parameter)', 'REFERENCE_ADAPTER}."))',
        "trainers/test_promises", "starts_at_ln_2 or reference_copy",
    ),
    Fault(
        "in half precision the reference is kept from another way", "DPO reference", "trainers.prefix.frozen",
        'return trainer.accelerator.mixed_precision == "no" and', "return True or",
        "trainers/test_equal_upstream", "no_margin_in_bf16",
    ),
    Fault(
        "the reference of a compiled model is looked for in its wrapper", "DPO reference", "trainers.loss_mixin",
        "self._unwrapped = model, self.accelerator.unwrap_model(model, keep_torch_compile=False)",
        "self._unwrapped = model, self.accelerator.unwrap_model(model)",
        "trainers/test_equal_upstream", "compiled",
    ),
    Fault(
        "the parent's default is the rate of a vector", "learning rates", "trainers.rates",
        "if args.learning_rate != default:", "if True:",
        "adapters/test_units", "default_rate_of_the_parent",
    ),
    Fault(
        "the unit is the same on every model", "learning rates", "adapters.units",
        "return STEP_SHARE * size / (", "return STEP_SHARE / (",
        "adapters/test_units", "larger_stream",
    ),
    Fault(
        "optimisers step in absolute units", "learning rates", "adapters.units",
        "yield parameter, unit", "yield parameter, 1.0",
        "adapters/test_units", "larger_stream",
    ),
    Fault(
        "gradients are absolute where they are clipped", "learning rates", "adapters.units",
        "return held + (weight - held) * module.unit", "return held + (weight - held)",
        "adapters/test_units", "every_optimiser",
    ),
    Fault(
        "a checkpoint of absolute rates goes on", "learning rates", "trainers.rates",
        "if sizes is None and config.stream_sizes:", "if False:",
        "adapters/test_units", "absolute_rates_is_refused",
    ),
    Fault(
        "nobody says what is trained", "another method than asked", "trainers.callbacks.announcement",
        "_say(_what_is_trained(model))", "return",
        "adapters/test_units", "what_is_trained",
    ),
    Fault(
        "the parent's own loss runs all layers", "slow by default", "trainers.parents",
        "return loss if equal else None", "return None",
        "trainers/test_equal_upstream", "takes_our_path",
    ),
    Fault(
        "the reference has dropout", "DPO reference", "trainers.model_at",
        "with reference_adapter(self.unwrapped), evaluating(self.unwrapped):",
        "with reference_adapter(self.unwrapped):",
        "trainers/test_model_at", "reference_has_no_dropout",
    ),
    Fault(
        "the hook keeps the first Parameter object", "hooks", "adapters.layer",
        "return units.value(self._vector(name, kind))",
        'return self.__dict__.setdefault("kept", {}).setdefault((name, kind), self._vector(name, kind).weight)',
        "adapters/test_peft_training", "parameter_object",
    ),
    Fault(
        "output[0] of a tensor", "tuple or tensor", "adapters.outputs",
        "return output[0] if isinstance(output, tuple) else output", "return output[0]",
        "adapters/test_exactness", "adding_by_hand and (llama or gpt2)",
    ),
    Fault(
        "the hook hangs twice", "vector added twice", "adapters.model",
        "layer.handle = target.register_forward_hook(layer.hook, prepend=True)",
        "layer.handle = target.register_forward_hook(layer.hook, prepend=True); "
        "target.register_forward_hook(layer.hook)",
        "adapters/test_exactness", "adding_by_hand and (llama or gpt2)",
    ),
    Fault(
        "the layer is off by one", "layer off by one", "adapters.model",
        "(blocks[i] for i in layers)", "(blocks[i - 1] for i in layers)",
        "adapters/test_exactness", "captured_states and llama",
    ),
    Fault(
        "activations are read one layer below", "layer off by one", "adapters.analysis.activations",
        "site_name(*blocks[i], site)", "site_name(*blocks[i - 1], site)",
        "adapters/test_directions", "collected_states",
    ),
    Fault(
        "the strength is ignored", "adapter has no effect", "adapters.layer",
        "hidden + strength * times * self._change(name, hidden)", "hidden + self._change(name, hidden)",
        "trainers/test_model_at", "at_minus_1",
    ),
    Fault(
        "the strength is not put back", "adapter has no effect", "adapters.strength",
        "layer.strength.update(strength)", "pass",
        "trainers/test_model_at", "strength_is_put_back",
    ),
    Fault(
        "vectors are bf16", "dtype", "adapters.parameter",
        "torch.full(shape, torch.nan, dtype=torch.float32", "torch.full(shape, torch.nan, dtype=torch.bfloat16",
        "adapters/test_peft_training", "bf16",
    ),
    Fault(
        "the adapter is saved empty", "ZeRO-3's empty file", "adapters.parameter",
        "self.register_load_state_dict_pre_hook(_check_loaded)",
        "self.register_state_dict_post_hook(lambda m, s, p, _: s.update({f'{p}weight': s[f'{p}weight'][:0]}))",
        "adapters/test_peft", "d_numbers",
    ),
    Fault(
        "merging drops the vector", "bias dropped on reload", "adapters.model",
        "        raise NotImplementedError(NO_MERGE)\n\n    def unload",
        "        return self.unload()\n\n    def unload",
        "adapters/test_peft", "merging_is_refused",
    ),
    Fault(
        "NaN in a file passes", "adapter keys not loaded", "adapters.saved",
        "    if bad:\n", "    if False:\n",
        "adapters/test_bad_input", "bad_files",
    ),
    Fault(
        "another base passes", "adapter keys not loaded", "adapters.model",
        "check_fingerprint(peft_config.base_fingerprint, self.model)", "pass",
        "adapters/test_bad_input", "another_base",
    ),
    Fault(
        "a vector of the config may be missing in the file", "adapter keys not loaded", "adapters.saved",
        "if expected_layers is not None and len(parameters) != expected_layers:", "if False:",
        "adapters/test_bad_input", "bad_files",
    ),
    Fault(
        "what is in the cache is forgotten", "positions with cache", "adapters.positions",
        "self._columns, self._past = tokens.shape[1], held or 0", "self._columns, self._past = tokens.shape[1], 0",
        "adapters/test_positions", "cached_generation and llama",
    ),
    Fault(
        "recurrent states are not counted", "positions with cache", "adapters.positions",
        "        self._count_after(module, cache, kwargs)\n", "",
        "adapters/test_position_families", "mamba-cached or minimax-cached",
    ),
    Fault(
        "generate without PEFT does not say its prompt", "positions with cache", "adapters.positions",
        "self.declared = self._prompt_columns(args, kwargs)", "self.declared = None",
        "adapters/test_position_families", "llama-inside",
    ),
    Fault(
        "packed samples are one", "positions in packed rows", "adapters.samples",
        "    return starts.cumsum(dim=1)\n", "    return None\n",
        "adapters/test_positions", "packed_row and position_ids",
    ),
    Fault(
        "a row has one prompt only", "positions in packed rows", "adapters.samples",
        "~labelled & (_nearest(labelled, samples, after=True) | ~before)", "~labelled & ~before",
        "adapters/test_positions", "several_answers",
    ),
    Fault(
        "several streams pass", "positions of parallel streams", "adapters.blocks",
        "if any(_PARALLEL_STREAMS.search(type(child).__name__) for child in block.children()):", "if False:",
        "adapters/test_position_families", "several_streams",
    ),
    Fault(
        "weights of the base pass", "the base is changed", "adapters.saved",
        "if \"steering_vector_\" not in key and not any(f\".{name}.\" in f\".{key}\" for name in saved)", "if False",
        "adapters/test_base_is_the_base", "extra_weights",
    ),
    Fault(
        "transformers loads unchecked", "the base is changed", "adapters.loading",
        "        check_adapter_folder(folder, loaded)\n", "        pass\n",
        "adapters/test_base_is_the_base", "extra_weights and transformers",
    ),
    Fault(
        "a merged LoRA passes", "the base is changed", "adapters.fingerprint",
        "        if worst is not None:\n", "        if False:\n",
        "adapters/test_base_is_the_base", "merged",
    ),
    Fault(
        "a cast vector stays cast", "dtype", "adapters.layer",
        "                    module.restore_fp32()\n", "                    pass\n",
        "adapters/test_fp32", "cast_model",
    ),
    Fault(
        "the score is not saved", "tasks", "adapters.tasks",
        "        if type(model).__name__.endswith(end):\n", "        if False:\n",
        "adapters/test_tasks", "reward_trainer",
    ),
    Fault(
        "the last prompt token is padding", "positions with padding", "adapters.samples",
        "candidates = prompts if real is None else prompts & real", "candidates = prompts",
        "adapters/test_positions", "real_one or either_side",
    ),
    Fault(
        "rows padded on the left are cut on the right", "positions with padding", "trainers.prefix.store",
        "(real * torch.arange(1, shape[1] + 1)).amax(dim=1).tolist()", "real.sum(dim=1).tolist()",
        "trainers/test_frozen_prefix", "left_padding",
    ),
    Fault(
        "random numbers start again in a resumed run", "resume RNG", "trainers.loss_mixin",
        'key = f"{self.args.seed}/{step}/{self.micro_step}".encode()',
        'self._drawn = getattr(self, "_drawn", 0) + 1; key = f"{self.args.seed}/{self._drawn}".encode()',
        "trainers/test_promises", "six_steps or evaluation_does_not_change",
    ),
    Fault(
        "the loss is not scaled by accumulation", "accumulation", "trainers.loss_mixin",
        "        if items is None:\n", "        if True:\n",
        "trainers/test_promises", "four_times_one",
    ),
    Fault(
        "checkpointing at another strength passes", "gradient checkpointing", "trainers.model_at",
        "return checkpointing and (inside or", "return False and (inside or",
        "trainers/test_promises", "bipo_with_checkpointing",
    ),
    Fault(
        "blocks run again at another prompt's end", "gradient checkpointing", "trainers.prefix.checkpointing",
        "stack.enter_context(circumstance())", "circumstance()",
        "trainers/test_prefix_checkpointing", "mlp_on or mlp",
    ),
    Fault(
        "blocks run again write to the same cache", "gradient checkpointing", "trainers.prefix.checkpointing",
        "copied = _copied(before)", "copied = cache",
        "trainers/test_prefix_checkpointing", "architecture and llama",
    ),
    Fault(
        "reentrant checkpointing keeps the prefix", "gradient checkpointing", "trainers.prefix.checkpointing",
        "_flagged(block) and _is_reentrant(block)", "False and _is_reentrant(block)",
        "trainers/test_prefix_checkpointing", "reentrant",
    ),
    Fault(
        "an adapter that is switched on again is trained", "observer changes training", "adapters.observing",
        "            if parameter.requires_grad != requires_grad:\n", "            if False:\n",
        "trainers/test_observers", "frozen",
    ),
    Fault(
        "an evaluation sees another loop's values", "metrics accumulate", "trainers.callbacks.metrics",
        "        values = _Values()\n        with self._opened(values):\n",
        "        values = self.__dict__.setdefault('_kept', _Values())\n        with self._opened(values):\n",
        "trainers/test_evaluation", "nothing_of_another",
    ),
    Fault(
        "an error of the memo ends training", "memo's own errors", "trainers.prefix.cached_pass",
        "        except Exception as error:\n            self._leave_nothing_out()\n",
        "        except ZeroDivisionError as error:\n            self._leave_nothing_out()\n",
        "trainers/test_frozen_prefix", "inside_changes",
    ),
    Fault(
        "a pass that failed has drawn random numbers", "memo's own errors", "trainers.prefix.cached_pass",
        "            if rewind is not None:\n", "            if False:\n",
        "trainers/test_frozen_prefix", "inside_changes",
    ),
    Fault(
        "rows in one line share a token that one of them steers", "packed rows", "trainers.prefix.packing",
        "torch.minimum(common_RR, first_RR)", "common_RR",
        "trainers/test_prefix_packing", "prompts_end_elsewhere or unequal_rows",
    ),
    Fault(
        "a block that is run again forgets where rows begin", "packed rows", "trainers.prefix.packing",
        "return nullcontext if _now is None else", "return nullcontext if True else",
        "trainers/test_prefix_checkpointing", "architecture and llama",
    ),
    Fault(
        "rows that round otherwise together are kept", "packed rows", "trainers.prefix.new_rows",
        "if not all(torch.equal(state, alone[stop])", "if False and not all(torch.equal(state, alone[stop])",
        "trainers/test_prefix_packing", "round_otherwise",
    ),
    Fault(
        "a NaN loss goes on", "NaN hidden in logs", "trainers.callbacks.finite",
        "        if not torch.isfinite(losses).all():\n", "        if False:\n",
        "trainers/test_bad_input", "training_stops",
    ),
    Fault(
        "the memo's key has no precision", "stale memo", "trainers.prefix.store",
        'f"{namespace}/{device}/{precision}"', 'f"{namespace}/{device}"',
        "trainers/test_prefix_memo", "precision",
    ),
    Fault(
        "the memo's key has no dtype of weights", "stale memo", "trainers.prefix.store",
        "tuple(tensor.shape), str(tensor.dtype), content)", "tuple(tensor.shape), content)",
        "trainers/test_prefix_memo", "dtype_of_equal_bits",
    ),
    Fault(
        "the memo's key has no settings", "stale memo", "trainers.prefix.store",
        "hashlib.blake2b(repr(settings).encode(), digest_size=16)", "hashlib.blake2b(digest_size=16)",
        "trainers/test_prefix_memo", "other_settings or reference_adapter",
    ),
    Fault(
        "chosen and rejected are swapped in the margin", "sign", "losses._base",
        "return (policy.chosen.logps - reference.chosen.logps) - (policy.rejected.logps - reference.rejected.logps)",
        "return (policy.rejected.logps - reference.rejected.logps) - (policy.chosen.logps - reference.chosen.logps)",
        "losses/test_losses", "by_hand or chosen_rises",
    ),
    Fault(
        "chosen and rejected are swapped in directions", "sign", "adapters.analysis.activations",
        "for i, (chosen, _) in halves.items()},\n        rejected={i: rejected for i, (_, rejected)",
        "for i, (_, chosen) in halves.items()},\n        rejected={i: rejected for i, (rejected, _)",
        "adapters/test_directions", "collected_states",
    ),
    Fault(
        "β of DPO is dropped", "hyperparameters", "losses.dpo",
        "-logsigmoid(self.beta * reference_margin(at))", "-logsigmoid(reference_margin(at))",
        "losses/test_losses", "by_hand or is_its_formula",
    ),
    Fault(
        "training metrics hold those of evaluation", "logs", "trainers.callbacks.metrics",
        "self._open[-1][name].append(value)",
        "(self._training if self._training else self._open[-1])[name].append(value)",
        "trainers/test_promises", "evaluation_margins or logged_keys",
    ),
    Fault(
        "test rows may stand in training", "leaks", "recipes.lab.splits",
        "    pool = _apart(name, pool, validation, scorer, test, sizes, parts.by)\n", "",
        "recipes/test_splits", "two_splits or near_duplicates",
    ),
    Fault(
        "larger training sets do not hold the smaller", "leaks", "recipes.lab.splits",
        "default_rng([seed, draw] if draw else seed)", "default_rng([seed, draw] if draw else seed + examples)",
        "recipes/test_splits", "nested",
    ),
    Fault(
        "percentile bootstrap in place of BCa", "statistics", "recipes.lab.intervals",
        'method="BCa"', 'method="percentile"',
        "recipes/test_statistics", "bca_interval_of_scipy",
    ),
    Fault(
        "a judgement that fails counts as 0", "judge", "recipes.lab.scorers.judge",
        "        return None\n\n    def score", "        return 0.0\n\n    def score",
        "recipes/test_scorers", "none_never_zero",
    ),
    Fault(
        "an argument that our loss does not use passes", "arguments that change nothing", "trainers.arguments",
        "    for name in unused_by(loss, args):", "    for name in unused_by(loss, args)[:0]:",
        "trainers/test_arguments", "refused_with_ours",
    ),
    Fault(
        "a β that trains the wrong way round passes", "arguments that change nothing", "trainers.arguments",
        "        if name in _RANGES and not _makes_sense(name, value):", "        if False:",
        "trainers/test_arguments", "without_sense",
    ),
    Fault(
        "a checkpoint without its optimizer passes", "whole means whole", "trainers.checkpoint_files",
        'if not any(any(folder.glob(name)) for name in ("optimizer.pt", "optimizer.bin", "optimizer_*/")):',
        "if False:",
        "trainers/test_checkpoint_files", "missing_state_is_named",
    ),
    Fault(
        "random numbers of a process may be missing", "whole means whole", "trainers.checkpoint_files",
        "    return None if gap is None else", "    return None if True else",
        "trainers/test_checkpoint_files", "have_no_gap",
    ),
    Fault(
        "every model is a causal language model", "refused though upstream does it", "adapters.tasks",
        "config.task_type = task_of(model)", 'config.task_type = "CAUSAL_LM"',
        "adapters/test_tasks", "wrapped_as_peft_does or reward_trainer",
    ),
    Fault(
        "every adapter is saved at the top of its folder", "refused though upstream does it", "trainers.checkpoints",
        'return folder if name == "default" else folder / name', "return folder",
        "trainers/test_adapter_names", "name_changes_nothing",
    ),
    Fault(
        "rows keep the format of tensors", "refused though upstream does it", "trainers.data",
        '    if not isinstance(data, Dataset) or data.format["type"] == "custom":', "    if True:",
        "trainers/test_data_forms", "format_of_a_data_set",
    ),
    Fault(
        "a message that calls tools needs content", "refused though upstream does it", "trainers.data",
        "if not isinstance(message.get(content), str | list | None):",
        "if not isinstance(message.get(content), str | list):",
        "trainers/test_data_forms", "call_tools",
    ),
    Fault(
        "lines of new rows are not filled", "packed rows", "trainers.prefix.new_rows",
        "layout, call = alone_layout(rows, filled)", "layout, call = alone_layout(rows)",
        "trainers/test_prefix_packing", "lines_are_filled",
    ),
]  # fmt: skip
