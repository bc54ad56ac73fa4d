"""Evaluate the published models one after the other, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ecoformer.checkpoint import resolve_source
from ecoformer.config import make_config
from ecoformer.data.datasets import open_dataset
from ecoformer.engine.run import evaluate
from ecoformer.errors import InputError
from ecoformer.files import write_text
from ecoformer.tools.table import Value, format_csv, read_csv

# What two evaluations share that must give the same accuracy.
_IDENTITY = ("name", "sha256", "data_set", "data_path", "input_size")


@dataclass(frozen=True)
class Validation:
    """Images to evaluate on, named as the flags take them, and how; ``input_size`` in pixels."""

    data_set: str
    data_path: str
    batch_size: int
    device: torch.device
    input_size: int = 224


def evaluate_models(
    weights: Mapping[str, str], validation: Validation, record: Path
) -> dict[str, dict[str, Value]]:
    """Evaluate models, and keep a record in which the next call finds what is done.

    Args:
        weights: ``"VARIANT/ATTENTION"`` to a path, URL or zoo name.
        record: a CSV file, to which each accuracy is added at once; it need not exist.

    Returns:
        Accuracy, and what it is of, by the same names.

    Raises:
        InputError: data or weights cannot be used.
        NonFiniteError: a model's output is not finite.
    """
    # Before weights are downloaded: the data may not be there.
    open_dataset(validation.data_set, validation.data_path, "val", input_size=validation.input_size)
    done = read_csv(record)
    results: dict[str, dict[str, Value]] = {}
    for name, source in weights.items():
        path = resolve_source(source)
        row: dict[str, Value] = {
            "name": name,
            "weights": source,
            "sha256": _digest(path),
            "data_set": validation.data_set,
            "data_path": validation.data_path,
            "input_size": str(validation.input_size),
        }
        earlier = [other for other in done if all(other.get(key) == row[key] for key in _IDENTITY)]
        if earlier:
            results[name] = row | {key: float(earlier[-1][key] or 0) for key in ("top1", "top5")}
            continue
        variant, attention = name.split("/")
        config = make_config(
            model=variant,
            attn_type=attention,
            resume=str(path),
            data_set=validation.data_set,
            data_path=validation.data_path,
            batch_size=validation.batch_size,
            input_size=validation.input_size,
            device=str(validation.device),
        )
        metrics = evaluate(config)
        print(f"{name}: {metrics}", flush=True)
        top1, top5 = (metrics.values[f"test_acc{k}"] for k in (1, 5))
        results[name] = row | {"top1": top1, "top5": top5}
        done.append(results[name])
        write_text(record, format_csv(done))
    return results


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name weights.") from None
