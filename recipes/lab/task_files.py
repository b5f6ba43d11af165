"""Task files of lm-eval can run code: `!function` names a function to call, and templates can reach all of Python.

`check_task_file` refuses the first, and `sandboxed` runs templates in Jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from steertune.recipes.lab.files import ArmError, read_text, shown

SUFFIXES = (".yaml", ".yml")
_ALLOW = "Remove it, or allow it with --run-task-code: such a file can do all that you can."


def check_task_file(file: Path, including: tuple[Path, ...] = ()) -> None:
    """Refuse a task file, or one that it includes, that names code. `including` are the files that led here.

    Raises:
        ArmError: it is not a YAML table, has a tag (such as `!function`), or includes itself.
    """
    file = file.resolve()
    if file in including:
        raise ArmError(f"{file} includes itself. Remove one `include`.")
    try:
        root: Any = yaml.compose(read_text(file, "YAML"), Loader=yaml.SafeLoader)  # no values are constructed
    except (yaml.YAMLError, RecursionError) as error:
        raise ArmError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ArmError(f"{file} is not a task: it must be a table of keys.")
    for node in _nodes(root, set()):
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            raise ArmError(
                f"{file}, line {node.start_mark.line + 1}: {shown(f'{node.tag} {node.value}')} runs code. {_ALLOW}"
            )
    settings: dict[str, Any] = {str(key.value): value for key, value in root.value}
    if "unsafe_code" in settings and settings["unsafe_code"].value != "false":
        raise ArmError(f"{file}: unsafe_code runs what the model writes. {_ALLOW}")
    include: Any = settings.get("include")
    nodes = [] if include is None else include.value if isinstance(include, yaml.SequenceNode) else [include]
    for name in (str(node.value) for node in nodes):
        included = file.parent / name
        if not included.is_file():
            raise ArmError(f"{file}: include={shown(name)} does not exist. Correct the path, or remove it.")
        check_task_file(included, (*including, file))


def check_task_folder(folder: Path) -> None:
    """Call `check_task_file` on every task file in a folder and below.

    Raises:
        ArmError: see `check_task_file`.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix in SUFFIXES and file.is_file():
            check_task_file(file)


@contextmanager
def sandboxed() -> Iterator[None]:
    """Context in which lm-eval renders templates in Jinja's sandbox, where they can only access the row."""
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = lm_eval.utils.env
    safe = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    safe.filters |= plain.filters
    lm_eval.utils.env = safe
    try:
        yield
    finally:
        lm_eval.utils.env = plain


def _nodes(node: yaml.Node, met: set[int]) -> Iterator[yaml.Node]:
    """A node and all nodes inside it, each once even if aliases repeat it."""
    if id(node) in met:
        return
    met.add(id(node))
    yield node
    for inner in node.value if isinstance(node, yaml.CollectionNode) else ():
        for child in inner if isinstance(inner, tuple) else (inner,):
            yield from _nodes(child, met)
