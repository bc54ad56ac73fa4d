"""What a run can train; a task of your own joins by ``register_task`` or as ``MODULE:CLASS``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ecoformer.errors import InputError, suggest

if TYPE_CHECKING:
    from ecoformer.tasks.base import Task

T = TypeVar("T", bound="type[Task]")

# Where the class is, or the class itself.
TASKS: dict[str, str | type[Task]] = {
    "classification": "ecoformer.tasks.classification:Classification",
    "sequence": "ecoformer.tasks.sequence:SequenceClassification",
    "detection": "ecoformer.tasks.detection:Detection",
    "segmentation": "ecoformer.tasks.segmentation:Segmentation",
}


def register_task(name: str) -> Callable[[T], T]:
    """Give a ``Task`` the name that ``--task`` and configurations call it by."""

    def register(task: T) -> T:
        TASKS[name] = task
        return task

    return register


def find_task(name: str) -> type[Task]:
    """Look a task up by its name or as ``"module:Class"``; an InputError where there is none."""
    found = TASKS.get(name, name)
    if not isinstance(found, str):
        return found
    module, colon, attribute = found.partition(":")
    if not colon:
        raise InputError(
            f"there is no task {name!r}{suggest(name, TASKS)} There are: {', '.join(TASKS)}; name "
            "one of your own as MODULE:CLASS."
        )
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"task {name!r} cannot be imported ({error}); name it as MODULE:CLASS."
        ) from error
    from ecoformer.tasks.base import Task

    if not (isinstance(task, type) and issubclass(task, Task)):
        raise InputError(f"task {name!r} is no ecoformer.tasks.base.Task; derive it from that.")
    return task
