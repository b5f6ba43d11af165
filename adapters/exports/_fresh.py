"""Run in a process of its own: the lines of an export, then the logits at some inputs.

    python -P _fresh.py JOB.json

The job names the lines, the inputs (token ids) and where the logits go. This package is not imported, and that is
checked.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
names: dict = {}
exec(compile(job["lines"], "the export's README", "exec"), names)
model = names["model"]
with torch.no_grad():
    found = {str(i): model(input_ids=torch.tensor([ids])).logits[0].float() for i, ids in enumerate(job["inputs"])}
assert not any(name.startswith("steertune") for name in sys.modules), "the package under test was imported"
save_file({name: logits.contiguous() for name, logits in found.items()}, job["logits"])
