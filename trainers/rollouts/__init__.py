"""Completions for GRPO from a model with vectors: at several strengths of one, or from an engine that takes vectors.

| file | what it holds |
|---|---|
| `steered.py` | `SteeredRollouts`, for `SteeringGRPOTrainer(rollout_func=)` |
| `engine.py` | the requests to an engine, and its results |
| `local.py` | the engine that runs transformers |
| `hotwire.py` | the engine that runs vLLM, with a vector in every request |
| `direction_score.py` | a reward: how far answers lie along a direction |
"""

from .direction_score import DirectionScore
from .engine import Completion, Engine, Request, Sampling
from .errors import RolloutError
from .hotwire import HotwireEngine
from .local import TransformersEngine
from .steered import SteeredRollouts

__all__ = [
    "Completion",
    "DirectionScore",
    "Engine",
    "HotwireEngine",
    "Request",
    "RolloutError",
    "Sampling",
    "SteeredRollouts",
    "TransformersEngine",
]
