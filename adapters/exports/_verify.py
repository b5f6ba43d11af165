"""Verify in a fresh process that an export behaves like the steered model, with the lines of its README."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from ..observing import evaluating, untouched
from ..strength import set_strength
from ._base import Export, ExportError

_FRESH = Path(__file__).with_name("_fresh.py")
_ROUNDING = 64  # units of the model's precision, relative to the largest logit
_TELLING = 10  # the effect of the vector must be this many times larger than rounding


def verify(
    target: Export, folder: Path, model: PeftModel, base: str, inputs: Sequence[Sequence[int]], strength: float
) -> tuple[float, float]:
    """The largest difference of a logit from the steered model's, and the largest change caused by the vector.

    Raises:
        ExportError: the lines do not run, the logits differ, or the vector moves them too little to verify.
    """
    if not inputs or not all(len(ids) for ids in inputs):
        raise ExportError("inputs is empty. Give the token ids of at least one prompt, on which logits are compared.")
    with set_strength(model, strength):
        steered = _logits(model, inputs)
    with untouched(model), model.disable_adapter():
        plain = _logits(model, inputs)
    limit = _ROUNDING * torch.finfo(model.dtype).eps * max(float(x.abs().max()) for x in steered)
    effect = max(float((a - b).abs().max()) for a, b in zip(steered, plain, strict=True))
    if effect < _TELLING * limit:
        raise ExportError(
            f"The vector moves logits by at most {effect:.2g}, too close to rounding error ({limit:.2g}) to verify "
            "the export. Use a larger strength, or a base in fp32."
        )
    exported = _in_fresh_process(target.lines(base, str(folder), model), inputs)
    error = max(float((a - b).abs().max()) for a, b in zip(steered, exported, strict=True))
    if not error <= limit:
        raise ExportError(
            f"The export does not behave the same: logits differ by {error:.2g} (allowed {limit:.2g}) where the "
            f"vector moves them by {effect:.2g}. Is base={base!r} the base of this adapter? No files were kept."
        )
    return error, effect


@torch.no_grad()
def _logits(model: PeftModel, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
    with evaluating(model):
        return [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in inputs]


def _in_fresh_process(lines: str, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        job, logits = Path(folder) / "job.json", Path(folder) / "logits.safetensors"
        job.write_text(json.dumps({"lines": lines, "inputs": [list(ids) for ids in inputs], "logits": str(logits)}))
        ran = subprocess.run([sys.executable, "-P", str(_FRESH), str(job)], capture_output=True, text=True)
        if ran.returncode:
            raise ExportError(f"A fresh process cannot load the export:\n{lines}\n{ran.stderr[-1500:]}")
        values = load_file(logits)
    return [values[str(i)] for i in range(len(inputs))]
