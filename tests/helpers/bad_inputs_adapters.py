"""Adapter folders, and control vectors of other tools."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_inputs import Lab, Row
from safetensors.torch import load_file, save_file
from tiny_models import steered, tiny

from steertune.adapters import SteeringVectorConfig, exports
from steertune.adapters.exports import adapter_of, gguf, repeng, steering_vectors
from steertune.recipes import info

KEY = "base_model.model.model.layers.2.steer.steering_vector_v.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load(lab: Lab, folder: Path) -> SteeringVectorConfig:
    """What every way to load an adapter starts with."""
    return SteeringVectorConfig.from_pretrained(str(folder))


def config(says: str, **changes: Any) -> Row:
    """The configuration with other values."""

    def call(lab: Lab) -> Any:
        folder = lab.adapter()
        values = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if v is not DROP}))
        return load(lab, folder)

    return call, says


def raw(says: str, content: bytes | None, name: str = CONFIG) -> Row:
    """A file with another content; None: a directory in its place."""

    def call(lab: Lab) -> Any:
        folder = lab.adapter()
        (folder / name).unlink()
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
        return load(lab, folder)

    return call, says


def weights(says: str, change: Callable[[torch.Tensor], dict[str, torch.Tensor]], **changes: Any) -> Row:
    """The weights with other tensors, under a configuration with other values."""

    def call(lab: Lab) -> Any:
        folder = lab.adapter()
        save_file(change(load_file(folder / WEIGHTS)[KEY]), folder / WEIGHTS)
        values = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(values))
        return load(lab, folder)

    return call, says


def header(tensors: Any, data: bytes = b"", declared: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(tensors).encode() if not isinstance(tensors, bytes) else tensors
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


def flipped(lab: Lab) -> Any:
    folder = lab.adapter()
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-7] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    return load(lab, folder)


def pipe(lab: Lab) -> Any:
    folder = lab.adapter()
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    return load(lab, folder)


def dangling(lab: Lab) -> Any:
    folder = lab.adapter()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/nowhere/adapter_model.safetensors")
    return load(lab, folder)


def gguf_file(says: str, content: bytes) -> Row:
    return (lambda lab: gguf.read(lab.file("x.gguf", content))), says


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def control(tensors: int, fields: int, rest: bytes) -> bytes:
    """A GGUF file from the numbers in its header on."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def describe(lab: Lab) -> Any:
    folder = lab.adapter()
    (folder / WEIGHTS).unlink()
    return info.describe(folder)


def export(says: str, target: Any, folder: str = "out", **options: Any) -> Row:
    def call(lab: Lab) -> Any:
        model = lab.made.setdefault("steered", steered())
        lab.file("full/README.md", "mine")
        lab.file("file", "mine")
        return exports.export(model, target, lab.here / folder, **{"base": "b", "inputs": [[5]], **options})

    return call, says


DROP = object()
ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"controlvector")
FULL = torch.ones(32)
GB10 = 10 * 2**30
DAMAGED = "is not the configuration of an adapter.*Save or download it again"
READABLE = "not a readable safetensors file"
FINGERPRINT = {"model_type": "llama", "hidden_size": 32, "num_layers": 4, "embedding": [0.1] * 64}
PRINT = "base_fingerprint=.* is not a fingerprint.*Set it to None to transfer"

ROWS: dict[str, Row] = {
    # adapter_config.json as a file
    "config is empty": raw(DAMAGED, b""),
    "config is a directory": raw("Can't find 'adapter_config.json'", None),
    "config is noise": raw(DAMAGED, bytes(range(256))),
    "config is NUL": raw(DAMAGED, b"\0" * 50),
    "config is UTF-16": raw(DAMAGED, '{"peft_type": "STEERING_VECTOR"}'.encode("utf-16")),
    "config is cut off": raw(DAMAGED, b'{"peft_type": "STEERING_VEC'),
    "config is nested 100000 deep": raw(DAMAGED, b"[" * 100_000),
    "config is a list": raw("expected a JSON object, got list", b"[]"),
    "config is a number": raw("expected a JSON object, got int", b"5"),
    "config of eleven megabytes": raw("more than 10000000 bytes", b" " * 11_000_000),
    "config of another method": config("holds a LORA adapter, not a steering vector", peft_type="LORA"),
    "config of an unheard-of method": config("holds a OS.SYSTEM adapter", peft_type="OS.SYSTEM"),
    "config without a method": config("holds a None adapter", peft_type=DROP),
    "config with a method that is a list": config(r"holds a \['LORA'\] adapter", peft_type=["LORA"]),
    "config that names code": config(
        "auto_mapping names code to import.*Remove it",
        auto_mapping={"parent_library": "os", "base_model_class": "system"},
    ),
    # its values
    "form is a list": config(r"form=\['bias'\] is not one of", form=["bias"]),
    "form of look-alike letters": config("form='bіas' is not one of", form="b\u0456as"),
    "rank is a truth value": config("rank=True must be a whole number of at least 1", form="low_rank", rank=True),
    "rank is text": config("rank='2' must be a whole number", form="low_rank", rank="2"),
    "rank that would fill the memory": config(r"the config asks for \(1000000000, 32\)", form="low_rank", rank=10**9),
    "tied is text": config("tied='yes' must be bool, got str", tied="yes"),
    "init is a number": config("init=5 is not 'zeros', 'random' or a direction", init=5),
    "layers is a table": config("layers=.*'a' is neither an index", layers={"a": 1}),
    "layers is nested": config(r"layers=\[\[1\]\]: \[1\] is neither", layers=[[1]]),
    "layers is infinite": config("layers=inf: inf is out of range", layers=math.inf),
    "norm_value is NaN": config("needs a finite norm_value > 0, got nan", norm="capped", norm_value=math.nan),
    "init_scale is text": config("init_scale='1' is not a finite number", init_scale="1"),
    "residual norms are a list": config(
        "residual_norms=.*must map each layer to a finite number above 0", residual_norms=[1.0]
    ),
    "residual norms are NaN": config("residual_norms=.*a finite number above 0", residual_norms={"2": math.nan}),
    "residual norms are negative": config("residual_norms=.*above 0", residual_norms={"2": -1.0}),
    "residual norms of no layer": config("residual_norms=.*each layer", residual_norms={"../2": 1.0}),
    "residual norms are text": config("residual_norms=.*a finite number", residual_norms={"2": "1"}),
    "modules_to_save is text": config(
        "modules_to_save='lm_head' must be a list of module names", modules_to_save="lm_head"
    ),
    "modules_to_save of numbers": config("modules_to_save=.*must be a list of module names", modules_to_save=[5]),
    "target_modules is a list": config("target_modules=.*got list", target_modules=["model.layers.2"]),
    "target_modules that never ends": config(
        "is a regular expression, but a saved adapter must name its modules", target_modules="(([a-z.0-9])+)+#"
    ),
    "target_modules of everything": config("is a regular expression", target_modules=".*"),
    "target_modules of another layer": config("does not belong to an adapter on", target_modules=r"model\.layers\.1"),
    "target_modules is empty": config("is a regular expression", target_modules=""),
    "task type of nothing": config("Invalid task type", task_type="EXEC"),
    "fingerprint is text": config(PRINT, base_fingerprint="llama"),
    "fingerprint is empty": config(PRINT, base_fingerprint={}),
    "fingerprint of no width": config(PRINT, base_fingerprint=FINGERPRINT | {"hidden_size": 0}),
    "fingerprint of a text width": config(PRINT, base_fingerprint=FINGERPRINT | {"hidden_size": "32"}),
    "fingerprint with few numbers": config(PRINT, base_fingerprint=FINGERPRINT | {"embedding": [0.1] * 3}),
    "fingerprint with NaN": config(PRINT, base_fingerprint=FINGERPRINT | {"embedding": [math.nan] * 64}),
    "fingerprint with text": config(PRINT, base_fingerprint=FINGERPRINT | {"embedding": ["0.1"] * 64}),
    "fingerprint of another width": config(
        r"has shape \(32,\), but the config asks for \(64,\)", base_fingerprint=FINGERPRINT | {"hidden_size": 64}
    ),
    "checksum is a number": config("checksum=5 must be .*got int", checksum=5),
    "checksum of other weights": config("was damaged or changed after it was saved.*to null", checksum="sha256-00"),
    "a value changed by hand": config("was damaged or changed after it was saved", init_scale=3.0),
    # adapter_model.safetensors as a file
    "weights are empty": raw(READABLE, b"", WEIGHTS),
    "weights are a directory": raw(READABLE, None, WEIGHTS),
    "weights are noise": raw(READABLE, bytes(range(256)) * 4, WEIGHTS),
    "weights are a pipe": (pipe, READABLE),
    "weights are a link to nowhere": (dangling, READABLE),
    "weights whose header is longer than the file": raw(READABLE, header({}, declared=2**40), WEIGHTS),
    "weights whose header is as long as a number can be": raw(READABLE, header({}, declared=2**64 - 1), WEIGHTS),
    "weights whose header is nested": raw(READABLE, header(b"[" * 50_000), WEIGHTS),
    "weights whose header is no object": raw(READABLE, header([1]), WEIGHTS),
    "weights that declare ten gigabytes": raw(
        READABLE, header({KEY: {"dtype": "F32", "shape": [GB10 // 4], "data_offsets": [0, GB10]}}, bytes(128)), WEIGHTS
    ),
    "weights whose shape is not their size": raw(
        READABLE, header({KEY: {"dtype": "F32", "shape": [64], "data_offsets": [0, 128]}}, bytes(128)), WEIGHTS
    ),
    "weights of an unheard-of dtype": raw(
        READABLE, header({KEY: {"dtype": "F31", "shape": [32], "data_offsets": [0, 128]}}, bytes(128)), WEIGHTS
    ),
    "weights with a flipped bit": (flipped, "was damaged or changed after it was saved"),
    # its tensors
    "weights of whole numbers": weights("is of torch.int32: weights must be floating point", lambda v: {KEY: v.int()}),
    "weights of truth values": weights("is of torch.bool: weights must be floating point", lambda v: {KEY: v > 0}),
    "weights of half precision with infinity": weights(
        "holds 32 NaN or infinite", lambda v: {KEY: v.half() * math.inf}
    ),
    "weights beside which a layer of the base lies": weights(
        "It would overwrite the base model: remove it",
        lambda v: {KEY: v, "base_model.model.model.layers.0.mlp.down_proj.weight": torch.ones(32, 48)},
    ),
    "weights with a module that nobody saves": weights(
        "modules_to_save=None does not name it", lambda v: {KEY: v, "base_model.model.score.weight": v + 1}
    ),
    "weights with a NaN in a saved module": weights(
        "score.weight holds 1 NaN",
        lambda v: {KEY: v, "base_model.model.score.weight": torch.tensor([math.nan])},
        modules_to_save=["score"],
    ),
    "weights without any vector": weights("vectors for 0 layers", lambda v: {}),
    "weights of a path": weights(
        "does not belong", lambda v: {KEY: v, KEY.replace("model.layers", "../layers"): v + 1}
    ),
    "weights of no width": weights("has shape", lambda v: {KEY: v[:0]}),
    "weights that are one number": weights("has shape", lambda v: {KEY: v.sum()}),
    "weights of two widths, made for nothing": weights(
        r"has shape \(16,\), but the config asks for \(32,\)",
        lambda v: {KEY: v, KEY.replace("layers.2", "layers.3"): v[:16].clone()},
        base_fingerprint=None,
        target_modules=None,
        layers=[2, 3],
    ),
    "a configuration alone, described": (describe, "has no adapter_model.safetensors"),
    # control vectors of other tools
    "gguf of nothing": gguf_file("is not a readable GGUF file", b""),
    "gguf of another magic": gguf_file("is not a readable GGUF file", b"FUGG" + bytes(40)),
    "gguf of another version": gguf_file("is not a readable GGUF file", b"GGUF" + struct.pack("<IQQ", 99, 0, 0)),
    "gguf cut off in its header": gguf_file("more than the file holds", b"GGUF" + struct.pack("<I", 3)),
    "gguf with 2**60 fields": gguf_file("more than the file holds", control(0, 2**60, b"")),
    "gguf with 2**60 tensors": gguf_file("more than the file holds", control(2**60, 1, ARCHITECTURE)),
    "gguf with a list without end": gguf_file(
        "more than the file holds", control(0, 1, string(b"x") + struct.pack("<IIQ", 9, 0, 2**50))
    ),
    "gguf with a list as long as the file": gguf_file(
        "or than a control vector can hold",
        control(0, 1, string(b"x") + struct.pack("<IIQ", 9, 0, 10**6) + bytes(10**6)),
    ),
    "gguf with lists in lists": gguf_file(
        "is not a readable GGUF file",
        control(0, 1, string(b"x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    ),
    "gguf with a name that is no text": gguf_file(
        "is not a readable GGUF file", control(0, 1, string(b"\xff\xfe") + struct.pack("<I", 8) + string(b"a"))
    ),
    "gguf without an architecture": gguf_file("is not a readable GGUF file", control(0, 0, bytes(64))),
    "gguf with a tensor of ten gigabytes": gguf_file(
        "more than the file holds",
        control(1, 1, ARCHITECTURE + string(b"direction.1") + struct.pack("<IQIQ", 1, GB10, 0, 0) + bytes(64)),
    ),
    "gguf with a direction of look-alike digits": gguf_file(
        "must be named direction.N",
        control(1, 1, ARCHITECTURE + string("direction.²".encode()) + struct.pack("<IQIQ", 1, 4, 0, 0) + bytes(96)),
    ),
    "gguf without directions": gguf_file("all directions must have the same width", control(0, 1, ARCHITECTURE)),
    "gguf that is a folder": (
        (lambda lab: gguf.read(lab.root)),
        "is not a readable GGUF file: the file does not exist",
    ),
    "vectors of whole numbers": ((lambda lab: adapter_of(tiny(), {1: FULL.long()})), r"torch.int64 \(32,\)"),
    "vectors that are lists": ((lambda lab: adapter_of(tiny(), {1: [1.0] * 32})), "got .*list"),
    "vectors of a negative layer": ((lambda lab: adapter_of(tiny(), {-1: FULL})), "-1 is out of range"),
    "repeng of another object": ((lambda lab: repeng.read(5)), "int is not a repeng.ControlVector"),
    "steering_vectors of another object": ((lambda lab: steering_vectors.read({})), "dict is not a .*SteeringVector"),
    # exports
    "export to an unknown target": export("target='pfet' is not one of.*Did you mean 'peft'", "pfet"),
    "export to a target that is a path": export("target='../peft' is not one of", "../peft"),
    "export to a private file": export("target='_vectors' is not one of", "_vectors"),
    "export to no name": export("target=None is not one of", None),
    "export into a full folder": export("is not empty, and an export never overwrites", "safetensors", "full"),
    "export onto a file": export("is not empty", "safetensors", "file"),
    "export at strength 0": export("at strength 0 is zero or not finite", "safetensors", strength=0.0),
    "export at strength NaN": export("at strength nan is zero or not finite", "safetensors", strength=math.nan),
    "export without inputs": export("inputs is empty", "safetensors", inputs=[]),
    "export of a plain model": (
        lambda lab: exports.export(tiny(), "peft", lab.here / "x", "b", [[5]]),
        "LlamaForCausalLM has no adapter",
    ),
}
