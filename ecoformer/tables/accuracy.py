"""The accuracy of the published models, one after the other, so that a stopped run goes on."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ecoformer.checkpoint import load_checkpoint, resolve_source
from ecoformer.config import Config
from ecoformer.engine.evaluate import evaluate
from ecoformer.engine.precision import choose_amp_dtype
from ecoformer.errors import InputError
from ecoformer.tables.models import find_family
from ecoformer.tables.report import Value, format_csv, write_text

# What two evaluations share that must give the same accuracy.
_IDENTITY = ("name", "sha256", "data_set", "data_path")


@dataclass(frozen=True)
class Validation:
    """Images to evaluate on, and how.

    Args:
        data_set: as ``--data-set`` takes it.
        data_path: as ``--data-path`` takes it.
        batch_size: images a step.
        device: where the models run.
        input_size: image side, pixels.
    """

    data_set: str
    data_path: str
    batch_size: int
    device: torch.device
    input_size: int = 224


def evaluate_rows(
    rows: Sequence[dict[str, Value]],
    weights: Mapping[str, str],
    validation: Validation,
    record: Path,
) -> None:
    """Add the accuracy to those rows that have weights, and record each in a CSV file at once.

    Rows that the file holds already, of the same weights and data, are not evaluated again.

    Args:
        rows: from ``describe_models``; changed in place.
        weights: name of a row to a path, URL or zoo name.
        validation: images, and how.
        record: the CSV file.

    Raises:
        InputError: data or weights cannot be used.
        NonFiniteError: a model's output is not finite.
    """
    # Brings timm along, which takes seconds.
    from ecoformer.data import build_loaders

    config = Config.from_flat(
        {
            "data_set": validation.data_set,
            "data_path": validation.data_path,
            "batch_size": validation.batch_size,
        }
    )
    device = validation.device
    loaders = build_loaders(
        config.data, config.augment, input_size=validation.input_size, train=False
    )
    done = {_identify(row): row for row in _read_rows(record) if row.get("top1")}
    for row in rows:
        name = str(row["name"])
        if name not in weights:
            continue
        path = resolve_source(weights[name])
        row |= {
            "weights": weights[name],
            "sha256": _digest(path),
            "data_set": validation.data_set,
            "data_path": validation.data_path,
        }
        if earlier := done.get(_identify(row)):
            row |= {key: float(earlier[key]) for key in ("top1", "top5")}
            continue
        variant, attention = name.split("/")
        model = find_family(variant).create_model(
            variant, attention, num_classes=loaders.num_classes
        )
        load_checkpoint(model, path, exact=True)
        result = evaluate(
            model.to(device),
            loaders.eval,
            device=device,
            amp_dtype=choose_amp_dtype(None, device),
        )
        print(f"{name}: {result}", flush=True)
        row |= {"top1": result.acc1, "top5": result.acc5}
        write_text(record, format_csv(rows))


def _identify(row: Mapping[str, Value]) -> tuple[Value, ...]:
    return tuple(row.get(key) for key in _IDENTITY)


def _read_rows(record: Path) -> list[dict[str, str]]:
    """The rows of an earlier run's CSV file, if there was one."""
    if not record.exists():
        return []
    with record.open(encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name weights.") from None
