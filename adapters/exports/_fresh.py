"""Run as a separate process: execute the lines of an export, and save the logits on some inputs.

    python -P _fresh.py JOB.json

The job has the lines, the inputs (token ids) and the file for the logits. The script checks that this package is not
imported.
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
    logits = {str(i): model(input_ids=torch.tensor([ids])).logits[0].float() for i, ids in enumerate(job["inputs"])}
assert not any(name.startswith("steertune") for name in sys.modules), "the package under test was imported"
save_file({name: values.contiguous() for name, values in logits.items()}, job["logits"])
