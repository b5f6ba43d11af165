"""An engine that samples with vLLM through its plug-in hotwire: every request names its vectors.

The plug-in (github moudrkat/hotwire-vllm) reads a folder of files `NAME.pt`, each one tensor `(blocks, d)`, and adds
`scale` times row `layer` of the file that a request names to the output of that block. So only a few kilobytes have to
be synchronised with the trainer. Its interface is implemented as documented; it was tested only against a stand-in for
vLLM.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .engine import Completion, Request, Sampling


class HotwireEngine:
    """Samples with a `vllm.LLM` of the base model in which hotwire is installed.

    Args:
        llm: The `vllm.LLM`.
        folder: The folder that hotwire reads, `HOTWIRE_VECTORS` of vLLM's process.
        blocks: Number of decoder blocks of the model.
    """

    def __init__(self, llm: Any, folder: str | Path, blocks: int) -> None:
        self.llm, self.folder, self.blocks = llm, Path(folder), blocks

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Write the vectors that are new, and sample all completions in one call.

        Raises:
            ValueError: `sampling.more` has fields that vLLM does not have.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]  # optional

        if sampling.more:
            raise ValueError(
                f"generation_kwargs={dict(sampling.more)} belong to transformers. Leave them out with vLLM."
            )
        params = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=sampling.eos_token_id,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p or 0.0,
                repetition_penalty=sampling.repetition_penalty,
                logprobs=0,  # of the sampled token
                extra_args={"hotwire": self._named(request)},
            )
            for request in requests
        ]
        outputs = self.llm.generate([{"prompt_token_ids": request.prompt} for request in requests], params)
        return [_completion(output.outputs[0]) for output in outputs]

    def _named(self, request: Request) -> str:
        """The request's vectors in hotwire's format; they are written to a file named after their bytes."""
        if not request.vectors:
            return "[]"
        width = len(next(iter(request.vectors.values())))
        vectors_LD = torch.zeros(self.blocks, width)
        for layer, vector_D in request.vectors.items():
            vectors_LD[layer] = vector_D.float().cpu()
        name = hashlib.blake2b(vectors_LD.numpy().tobytes(), digest_size=8).hexdigest()
        file = self.folder / f"{name}.pt"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            # replaced in one step, because vLLM reads it from another process
            part = file.with_suffix(f".{os.getpid()}.part")
            torch.save(vectors_LD, part)
            part.replace(file)
        return json.dumps([{"id": name, "layer": layer, "scale": 1.0} for layer in sorted(request.vectors)])


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    logps = [options[token].logprob for token, options in zip(tokens, output.logprobs, strict=True)]
    return Completion(tokens, logps)
