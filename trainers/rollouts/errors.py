"""The error that rollouts raise."""


class RolloutError(ValueError):
    """Raised if a rollout or its reward does not work with this model or trainer; the message says what to change."""
