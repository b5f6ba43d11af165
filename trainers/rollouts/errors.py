"""What rollouts refuse."""


class RolloutError(ValueError):
    """A rollout or its reward does not work with this model or trainer; the message names what to change."""
