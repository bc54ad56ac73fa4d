"""Train and evaluate inside another command, and say how a user would."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ecoformer.config import make_config
from ecoformer.engine.logs import print_log
from ecoformer.engine.run import Run, evaluate, train
from ecoformer.tasks.base import Metrics


def run_training(values: Mapping[str, object]) -> Run:
    """Train as ``ecoformer train`` would with these fields; what is done is not done again.

    Raises:
        InputError, NonFiniteError, Preempted: see ``ecoformer.engine.run.train``.
    """
    config = make_config(**values)
    _say("train", values)
    with print_log():
        return train(config)


def run_evaluation(values: Mapping[str, object]) -> Metrics:
    """Evaluate as ``ecoformer eval`` would with these fields.

    Raises:
        InputError, NonFiniteError: see ``ecoformer.engine.run.evaluate``.
    """
    config = make_config(**values)
    _say("eval", values)
    with print_log():
        return evaluate(config)


def _say(command: str, values: Mapping[str, object]) -> None:
    print(f"\n$ ecoformer {command} {shlex.join(spell_flags(values))}", flush=True)


def spell_flags(values: Mapping[str, object]) -> list[str]:
    """Spell fields of a configuration as the words of a command line."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (tuple, list)):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", "none" if value is None else str(value)]
    return words
