"""Keep secrets out of files and messages: the settings of a recipe are written into configurations, cards and pages.

Anything that looks like a secret counts as one: tokens of Hugging Face, GitHub, GitLab, OpenAI, AWS, Google and Slack,
web tokens, a password or token in an address, and the values of environment variables whose names end in key, token,
secret or password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steertune.recipes.lab.files import ArmError, shown

_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bxox[a-z]-[\w-]{20,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|(?<=://)[^/\s@]+(?=@)"
    r"|(?<=[?&])(?i:access_token|token|api_?key|key|secret|password|sig|signature|x-amz-signature)=[^&\s]{4,}"
)
_VARIABLES = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_SHORTEST = 8  # characters; a shorter value of a variable may occur in any text by chance
_HIDDEN = "<secret>"


def masked(text: str) -> str:
    """A text with its secrets masked."""
    for value in _in_environment():
        text = text.replace(value, _HIDDEN)
    return _TOKENS.sub(_HIDDEN, text)


def holds_secret(text: str, values: Sequence[str] | None = None) -> bool:
    """Whether a text contains a secret. `values` are the secrets in the environment, which are looked up by
    default."""
    values = _in_environment() if values is None else values
    return _TOKENS.search(text) is not None or any(value in text for value in values)


def _in_environment() -> list[str]:
    return [value for name, value in os.environ.items() if _VARIABLES.search(name) and len(value) >= _SHORTEST]


def check_settings(table: Mapping[str, Any]) -> None:
    """Refuse settings that cannot be written into files, as all settings are: secrets, and numbers of 400 digits.

    Raises:
        ArmError: the message names the key, and never the secret.
    """
    secrets = _in_environment()
    for key, value in _leaves(table, ""):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ArmError(f"{masked(key)}={shown(value)} is too large: whole numbers have 64 bits.")
        named_token = key.rpartition(".")[2] in ("hub_token", "token", "api_key") and bool(value)
        if named_token or (isinstance(value, str) and holds_secret(value, secrets)):
            raise ArmError(
                f"{masked(key)} holds a secret, and settings are written into files. Remove it. Hugging Face reads "
                "its token from the environment variable HF_TOKEN, or from `hf auth login`; a judge's `key` is the "
                "name of an environment variable."
            )


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every value that is not a table or a list, with the keys that lead to it; keys are values as well."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            path = f"{where}.{key}" if where else str(key)
            yield where or "a key", str(key)
            yield from _leaves(inner, path)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, where)
    else:
        yield where, value
