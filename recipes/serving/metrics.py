"""Metrics of a running service in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_STEPS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUESTS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one service."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "steertune_requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], registry=registry
        )
        self.prompt_tokens = Counter("steertune_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens = Counter("steertune_generated_tokens", "Tokens drawn.", registry=registry)
        self.steps = Histogram("steertune_step_seconds", "Time of a step.", buckets=_STEPS, registry=registry)
        self.seconds = Histogram(
            "steertune_request_seconds",
            "Time until a request's answers were complete.",
            buckets=_REQUESTS,
            registry=registry,
        )
        self.running = Gauge("steertune_answers_running", "Answers under way.", registry=registry)
        self.waiting = Gauge("steertune_answers_waiting", "Answers that wait.", registry=registry)
        self.vectors = Gauge("steertune_vectors", "Vectors that requests can name.", registry=registry)

    def step(self, seconds: float, tokens: int) -> None:
        """Count a step of the engine."""
        self.steps.observe(seconds)
        self.tokens.inc(tokens)

    def text(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self._registry)
