"""The memo: its budget, its files, and what it refuses to believe."""

from __future__ import annotations

import logging
import multiprocessing
import random
import time

import pytest
import torch
from peft import get_peft_model
from prefixes import assert_equal, assert_same_with_shortcut, both_ways, pair_batch
from tiny_data import pairs, trained
from tiny_models import fill, of_the_prefix, tiny

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import FrozenPrefix, ModelAt
from steertune.trainers.prefix.store import TensorStore, row_key, weights_key

ROW = torch.arange(12.0).reshape(3, 4)  # 48 bytes


def steered(**changes):
    model = get_peft_model(tiny(**changes), SteeringVectorConfig(layers=2))
    fill(model)
    return model


def run(prefix: FrozenPrefix, model=None):
    model = steered() if model is None else model
    with torch.no_grad(), prefix.shortcut(model).on():
        return ModelAt(model, model, pair_batch())(1).token_logps


# -- budget ---------------------------------------------------------------------------------------------------------


def test_bytes_are_tokens_times_width_times_four():
    prefix = FrozenPrefix()
    run(prefix)
    real = int(pair_batch().inputs["attention_mask"].sum())
    assert prefix.memo.nbytes == real * 32 * 4 and prefix.memo.disk_bytes == 0


def test_a_tiny_budget_is_never_exceeded_and_changes_nothing(tmp_path):
    prefix = FrozenPrefix(ram_gb=2000 / 1e9)
    ours = trained("dpo", tmp_path / "a", loss="dpo", frozen_prefix=prefix)
    plain = trained("dpo", tmp_path / "b", loss="dpo", frozen_prefix=False)
    assert 0 < prefix.memo.nbytes <= 2000 < prefix.memo.disk_bytes
    assert_equal(ours, plain)


def test_temporary_files_end_with_the_memo():
    memo = TensorStore(0)
    memo.put("a", ROW)
    folder = memo._folder
    assert folder is not None and list(folder.iterdir())
    del memo
    assert not folder.exists()


def test_no_budget_is_the_plain_path_and_says_so(tmp_path, caplog):
    trained("dpo", tmp_path, loss="dpo", frozen_prefix=FrozenPrefix(ram_gb=0))
    assert "The frozen prefix is off: its budget is 0 GB." in caplog.text


@pytest.mark.parametrize("budget", [-1, float("inf"), float("nan")])
def test_impossible_budgets(budget):
    with pytest.raises(ValueError, match="the RAM budget in GB"):
        FrozenPrefix(ram_gb=budget)


def test_a_full_disk_is_said_once_and_changes_nothing(tmp_path, caplog, monkeypatch):
    def full(self, key, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorStore, "_append", full)
    ours, plain, _ = both_ways("dpo", tmp_path, loss="dpo")
    assert_equal(ours, plain)
    caplog.clear()
    prefix = FrozenPrefix(folder=tmp_path / "memo", ram_gb=0)
    ours = trained("dpo", tmp_path / "c", loss="dpo", frozen_prefix=prefix)
    assert_equal(ours, plain)
    assert [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()] == [
        "The frozen-prefix cache cannot write ([Errno 28] No space left on device). "
        "What exceeds 0 GB of RAM is computed again."
    ]


def test_disk_is_never_exceeded(tmp_path, caplog):
    memo = TensorStore(0, tmp_path, disk_gb=100 / 1e9)
    for key in "abc":
        memo.put(key, ROW)
    assert memo.disk_bytes == 96 and memo.get("b") is not None and memo.get("c") is None
    assert sum("of disk_gb=1e-07" in record.getMessage() for record in of_the_prefix(caplog)) == 1
    with pytest.raises(ValueError, match=r"disk_gb=-1 must be the disk budget in GB"):
        TensorStore(0, disk_gb=-1)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_later_memo_reads_the_same_bits(dtype, tmp_path):
    TensorStore(0, tmp_path).put("a", ROW.to(dtype))
    found = TensorStore(1, tmp_path).get("a")
    assert found is not None and found.dtype == dtype and torch.equal(found, ROW.to(dtype))


def test_a_later_run_computes_nothing(tmp_path, monkeypatch):
    first = run(FrozenPrefix(folder=tmp_path))
    from steertune.trainers.prefix.decoder import Decoder

    state, ran = Decoder.state, []
    monkeypatch.setattr(Decoder, "state", lambda self, call: (ran.append(1), state(self, call))[1])
    assert torch.equal(run(FrozenPrefix(folder=tmp_path)), first)
    assert len(ran) == 2, "the look at what runs below the cut, in both modes"


def files(folder):
    [rows], [index] = folder.glob("v3-*.rows"), folder.glob("v3-*.index")
    return rows, index


def spoil_a_byte(rows, index):
    data = bytearray(rows.read_bytes())
    data[5] ^= 1
    rows.write_bytes(data)


def cut_the_rows(rows, index):
    rows.write_bytes(rows.read_bytes()[:-1])


def cut_the_index(rows, index):
    index.write_bytes(index.read_bytes()[:-5])


def lose_the_rows(rows, index):
    rows.unlink()


def lie_about_the_shape(rows, index):
    index.write_text(index.read_text().replace("[3, 4]", "[4, 4]"))


def another_version(rows, index):
    for file in (rows, index):
        file.rename(file.with_name(file.name.replace("v3-", "v1-")))


@pytest.mark.parametrize(
    "damage", [spoil_a_byte, cut_the_rows, cut_the_index, lose_the_rows, lie_about_the_shape, another_version]
)
def test_damaged_files_are_not_believed(damage, tmp_path):
    TensorStore(0, tmp_path).put("a", ROW)
    damage(*files(tmp_path))
    memo = TensorStore(1, tmp_path)
    assert memo.get("a") is None and "a" not in memo
    memo.put("a", ROW)  # computed again
    assert torch.equal(TensorStore(1, tmp_path).get("a"), ROW)


def _write_for_ever(folder, started):
    memo = TensorStore(0, folder)
    for i in range(len(memo), 10**6):
        memo.put(str(i), torch.full((500,), float(i)))
        started.set()


def test_a_writer_killed_at_any_moment_leaves_nothing_wrong_behind(tmp_path):
    numbers, processes, known = random.Random(0), multiprocessing.get_context("fork"), 0
    for _ in range(20):
        started = processes.Event()
        writer = processes.Process(target=_write_for_ever, args=(tmp_path, started))
        writer.start()
        assert started.wait(30)
        time.sleep(numbers.random() * 0.05)
        writer.kill()
        writer.join()
        memo = TensorStore(0, tmp_path)
        assert len(memo) > known
        known = len(memo)
        for i in range(known):
            found = memo.get(str(i))
            assert found is not None and torch.equal(found, torch.full((500,), float(i)))


def test_two_writers_share_a_folder(tmp_path):
    one, two = TensorStore(0, tmp_path), TensorStore(0, tmp_path)
    one.put("a", ROW)
    two.put("b", ROW + 1)
    assert two.get("a") is None
    two.refresh(), one.refresh()
    assert torch.equal(two.get("a"), ROW) and torch.equal(one.get("b"), ROW + 1)
    one.put("c", ROW + 2)
    two.refresh()
    assert torch.equal(two.get("c"), ROW + 2), "an index that grew is read on from where it was"


# -- what a memo belongs to -------------------------------------------------------------------------------------------


def hits(prefix: FrozenPrefix, model) -> bool:
    known = len(prefix.memo)
    run(prefix, model)
    return len(prefix.memo) == known


def changed(part: str):
    model = steered()
    with torch.no_grad():
        weight = model.get_base_model().get_submodule(part).weight
        weight[0, 0] += 2**-10
    return model


def test_shared_between_models_that_agree_below_the_cut():
    prefix = FrozenPrefix()
    run(prefix)
    assert hits(prefix, steered())
    assert hits(prefix, changed("model.layers.3.mlp.up_proj"))
    assert not hits(prefix, changed("model.layers.1.mlp.up_proj"))
    assert not hits(prefix, changed("model.embed_tokens"))
    assert not hits(prefix, steered().to(torch.bfloat16))
    eager = steered()
    eager.get_base_model().set_attn_implementation("eager")
    assert not hits(prefix, eager)


def test_another_adapter_with_the_same_cut_shares(tmp_path):
    from peft import LoraConfig

    prefix = FrozenPrefix()
    run(prefix)
    lora = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[3]))
    assert hits(prefix, lora)
    assert not hits(prefix, get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[2])))


def test_trainers_share_one(tmp_path):
    prefix = FrozenPrefix()
    trained("dpo", tmp_path / "a", loss="dpo", frozen_prefix=prefix)
    known = len(prefix.memo)
    shared = trained("dpo", tmp_path / "b", loss="ipo", frozen_prefix=prefix, learning_rate=0.01)
    assert len(prefix.memo) == known == 2 * 2 * len(pairs()), "a state and a reference for each answer"
    alone = trained("dpo", tmp_path / "c", loss="ipo", frozen_prefix=FrozenPrefix(), learning_rate=0.01)
    assert [h.get("loss") for h in shared.state.log_history] == [h.get("loss") for h in alone.state.log_history]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype, caplog):
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")
    model = steered().to(dtype)
    plain = ModelAt(model, model, pair_batch())(1).token_logps
    ours = run(FrozenPrefix(), model)
    torch.testing.assert_close(ours, plain, atol=0.05, rtol=0.05)
    assert not of_the_prefix(caplog)


def test_a_folder_says_whose_states_it_holds(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="steertune.trainers.prefix")
    (tmp_path / "v1-old.rows").write_bytes(b"")
    run(FrozenPrefix(folder=tmp_path))
    assert "holds files of version v1. This run uses LlamaForCausalLM of width 32 up to block 2" in caplog.text
    caplog.clear()
    run(FrozenPrefix(folder=tmp_path))
    assert not of_the_prefix(caplog), "it is its own now"
    run(FrozenPrefix(folder=tmp_path), steered(seed=5))
    assert "holds LlamaForCausalLM of width 32" in caplog.text and "computed anew" in caplog.text


def test_an_index_that_cannot_be_read_is_said_and_left(tmp_path, caplog, monkeypatch):
    TensorStore(0, tmp_path).put("a", ROW)
    monkeypatch.setattr(TensorStore, "_read_index", lambda self, index: (tmp_path / "gone").read_bytes())
    assert TensorStore(1, tmp_path).get("a") is None
    assert "cannot read" in caplog.text


@pytest.mark.parametrize("setting", [{"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}])
def test_the_same_weights_under_other_settings_share_nothing(setting):
    """No weight says what an epsilon is: its states are not those of another."""
    prefix = FrozenPrefix()
    for changes in ({}, setting):
        model = steered(**changes)
        reference = prefix.reference(model)
        plain = ModelAt(model, model, pair_batch())
        with torch.no_grad(), prefix.shortcut(model).on():
            torch.testing.assert_close(ModelAt(model, model, pair_batch())(1).token_logps, plain(1).token_logps)
        known = ModelAt(model, model, pair_batch(), reference_memo=reference)
        torch.testing.assert_close(known(0).token_logps, plain(0).token_logps)


def test_the_scale_of_a_reference_adapter_is_in_its_key():
    """Continued LoRA: the frozen copy's tensors are the same whatever its alpha is."""
    from peft import LoraConfig

    prefix, found = FrozenPrefix(), []
    for alpha in (1, 16):
        model = get_peft_model(tiny(), LoraConfig(r=1, lora_alpha=alpha, target_modules=["down_proj"]))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if "lora_" in name:
                torch.nn.init.constant_(parameter, 0.3)
        reference = prefix.reference(model, trained=True)
        found.append(
            reference.outputs(pair_batch(), lambda batch, model=model: ModelAt(model, model, batch)(1)).token_logps
        )
    assert not torch.equal(*found)


def test_the_precision_of_autocast_is_in_the_key():
    row = {"input_ids": torch.arange(3)[None]}
    keys = {row_key("", row)}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.add(row_key("", row))
    assert len(keys) == 3


def test_the_dtype_of_equal_bits_is_in_the_key():
    dtypes = (torch.bfloat16, torch.float16, torch.int16)
    assert len({weights_key([("w", torch.zeros(3, dtype=dtype))]) for dtype in dtypes}) == 3


def test_prompts_of_finetuned_weights_are_their_own():
    """Weights that require gradients decide a prompt's keys and values too."""
    prefix, batch = FrozenPrefix(), pair_batch()
    for scale in (1.0, 3.0):
        base = tiny()
        base.model.layers[3].self_attn.v_proj.weight.data *= scale
        model = get_peft_model(base, SteeringVectorConfig(layers=1, positions="completion")).eval()
        fill(model)
        base.model.layers[3].requires_grad_(True)
        with torch.no_grad():
            plain = ModelAt(model, model, batch)(1).token_logps
            with prefix.shortcut(model).on(labels_only=True):
                ours = ModelAt(model, model, batch)(1).token_logps
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_the_reference_of_a_continued_adapter_is_its_own(tmp_path):
    prefix = FrozenPrefix()
    for scale in (1.0, 3.0):
        model = steered()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(scale)
        ours = trained("dpo", tmp_path / "a", loss="dpo", model=model, frozen_prefix=prefix)
        again = steered()
        with torch.no_grad():
            for parameter in again.parameters():
                if parameter.requires_grad:
                    parameter.mul_(scale)
        assert_equal(ours, trained("dpo", tmp_path / "b", loss="dpo", model=again, frozen_prefix=False))


def test_helper_finds_differences():
    model = steered()
    prefix = assert_same_with_shortcut(model, pair_batch())
    [key, *_] = prefix.memo._ram
    prefix.memo._ram[key].add_(1.0)
    batch = pair_batch()
    plain = ModelAt(model, model, batch)(1).token_logps
    assert not torch.allclose(run(prefix, model), plain, atol=1e-3)


def test_the_disk_budget_is_of_the_folder(tmp_path, caplog):
    """Whoever wrote before: else every run would add its own."""
    first = TensorStore(0, tmp_path, disk_gb=100 / 1e9)
    first.put("a", ROW), first.put("b", ROW)
    second = TensorStore(0, tmp_path, disk_gb=100 / 1e9)
    second.put("c", ROW)
    assert second.get("c") is None and sum(file.stat().st_size for file in tmp_path.glob("*.rows")) == 96
    assert "of disk_gb=1e-07" in caplog.text
    second.put("a", ROW)  # known: nothing to write


def test_a_folder_that_cannot_be_read_is_said_and_left(tmp_path, caplog, monkeypatch):
    from pathlib import Path

    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    run(FrozenPrefix(folder=tmp_path), steered(seed=5))
    for method, message in (("read_text", "cannot use"), ("glob", "cannot read")):
        caplog.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, refused)
            plain = run(FrozenPrefix(folder=tmp_path))
        assert message in caplog.text
        torch.testing.assert_close(plain, run(FrozenPrefix()))


def test_weights_below_that_no_token_has_met_are_in_the_key():
    """Experts that the first row did not choose."""
    prefix = FrozenPrefix()
    for value in (1.0, 2.0):
        model = steered()
        expert = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(expert.weight, value)
        torch.nn.init.constant_(expert.bias, value)
        model.get_base_model().model.layers[0].mlp.expert = expert
        assert not hits(prefix, model)
        assert hits(prefix, model)


@pytest.mark.parametrize("positions", ["all", "completion"])
def test_what_is_not_proven_is_not_kept(positions, monkeypatch, caplog):
    from steertune.trainers.prefix import proofs
    from steertune.trainers.prefix.exactness import NoPrefix

    def differs(self, call, what, *args):
        if positions == "all" or "completions" in what:
            raise NoPrefix(f"{what} is off")

    monkeypatch.setattr(proofs.Proofs, "make", differs)
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")
    model, prefix = get_peft_model(tiny(), SteeringVectorConfig(layers=2, positions=positions)), FrozenPrefix()
    with torch.no_grad(), prefix.shortcut(model).on(labels_only=True):
        ModelAt(model, model, pair_batch())(1)
    assert len(prefix.memo) == (0 if positions == "all" else 4) and "is off" in caplog.text
