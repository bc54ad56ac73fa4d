"""What a checkpoint says of how far a run is, checked as a whole before any of it is taken."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ecoformer.checkpoint.layout import to_ours
from ecoformer.config import Config
from ecoformer.engine.optim import create_optimizer, restore_schedule, schedule_state
from ecoformer.engine.state import TrainState, parameter_names
from ecoformer.sums import ExactMean

# Counters are kept in floating point, too: beyond this, one more changes nothing.
_LARGEST_COUNT = 2**53
# Of a group of parameters: what the configuration says, which may have been allowed to change.
_CONFIGURED = ("betas", "eps", "momentum", "weight_decay")
# Entries of our files, and those that earlier ones lack.
_OWN = {"step", "loss_sums", "config", "world_size", "versions"}
_NEWER = {"optimizer_names", "num_optimizer_states", "data"}


@dataclass(frozen=True)
class Progress:
    """The training state of a checkpoint, without the weights, in the present numbering."""

    optimizer: Mapping[str, Any]
    schedule: dict[str, Any]
    scaler: Mapping[str, Any]
    last_epoch: int
    step: int
    loss_sums: Sequence[int]
    best_score: float

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any], state: TrainState, config: Config) -> Progress:
        """Check a checkpoint's training state against a fresh one, which stays as it is.

        Raises:
            ValueError: it does not fit; or, of damaged files, another error.
        """
        _require_whole(checkpoint)
        _require_same_precision(to_ours(checkpoint["model"]), state.model.state_dict())
        epoch = _require_count("epoch", checkpoint["epoch"], least=-1)
        step = _require_count("step", checkpoint.get("step", 0))
        sums = checkpoint.get("loss_sums", (0, 0, 0))
        if not isinstance(sums, (list, tuple)) or len(sums) != 3:
            raise ValueError("loss_sums are not three integers")
        for value in sums:
            _require_count("one of loss_sums", value, least=-(2**63), most=2**63 - 1)
        best = checkpoint.get("best_score", checkpoint.get("best_acc1", state.best_score))
        if not _is_real(best) or math.isnan(best):
            raise ValueError("best_score is no number")
        return cls(
            optimizer=_read_optimizer(checkpoint, state, config),
            schedule=_read_schedule(checkpoint["lr_scheduler"], state),
            scaler=_read_scaler(checkpoint.get("scaler"), state, checkpoint.get("config", {})),
            last_epoch=epoch,
            step=step,
            loss_sums=sums,
            best_score=float(best),
        )

    def apply(self, state: TrainState) -> None:
        """Set a run to where it was."""
        state.optimizer.load_state_dict(dict(self.optimizer))
        if self.scaler:
            state.scaler.load_state_dict(dict(self.scaler))
        restore_schedule(state.schedule, self.schedule, last_epoch=self.last_epoch)
        state.epoch, state.step = self.last_epoch + 1, self.step
        state.loss = ExactMean(state.loss.device, self.loss_sums)
        state.best_score = self.best_score


def _require_whole(checkpoint: Mapping[str, Any]) -> None:
    """A file of ours has all that ours have; the released ones know less."""
    if not _OWN & checkpoint.keys():
        return
    required = _OWN | {"scaler"} | (_NEWER if _NEWER & checkpoint.keys() else set())
    # Earlier files knew accuracies only.
    scores = {"best_score", "best_acc1"} & checkpoint.keys()
    lost = sorted(required - checkpoint.keys()) or ([] if scores else ["best_score"])
    if lost:
        raise ValueError(f"it has lost {', '.join(lost)}")


def _require_same_precision(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Weights that were rounded start a run; they are not those that one was stopped with."""
    for name, tensor in present.items():
        if name in saved and saved[name].dtype != tensor.dtype:
            raise ValueError(f"{name} is {saved[name].dtype} in the place of {tensor.dtype}")


def _read_optimizer(
    checkpoint: Mapping[str, Any], state: TrainState, config: Config
) -> dict[str, Any]:
    """A state dict of the present optimiser."""
    saved, present = checkpoint["optimizer"], state.optimizer.state_dict()
    states, groups = saved["state"], saved["param_groups"]
    if not isinstance(states, Mapping) or not isinstance(groups, list):
        raise ValueError("the optimizer's state is none")
    numbers = _match_numbers(checkpoint, groups, state)
    if len(states) != checkpoint.get("num_optimizer_states", len(states)):
        raise ValueError(f"the optimizer has lost the state of some parameters, {len(states)} left")
    unknown = states.keys() - numbers.values()
    if unknown or (
        states and "num_optimizer_states" not in checkpoint and len(states) < len(numbers)
    ):
        raise ValueError(f"the optimizer has states of {len(states)} of {len(numbers)} parameters")
    names = parameter_names(state)
    kept = {
        number: _read_entries(names[number], states[old], expected)
        for (number, old), expected in zip(numbers.items(), _try_step(state, config), strict=True)
        if old in states
    }
    steps = {float(entries["step"]) for entries in kept.values() if "step" in entries}
    if len(steps) > 1:
        raise ValueError("the optimizer has done another number of steps for some parameters")
    pairs = zip(present["param_groups"], groups, strict=True)
    return {"state": kept, "param_groups": [_read_group(*pair) for pair in pairs]}


def _match_numbers(
    checkpoint: Mapping[str, Any], groups: Sequence[Any], state: TrainState
) -> dict[int, Any]:
    """Map the present numbers of parameters to those of a file.

    Optimisers number parameters as they were registered, and the released models registered them
    in another order; so did models of ours. Where a file does not say, its weights lie in that
    order.
    """
    names = parameter_names(state)
    order = checkpoint.get("optimizer_names")
    if order is None:
        order = [name for name in to_ours(checkpoint["model"]) if name in set(names)]
    if sorted(order) != sorted(names):
        raise ValueError("the optimizer is one of other parameters")
    places = {name: place for place, name in enumerate(order)}
    numbers: dict[int, Any] = {}
    present = state.optimizer.state_dict()["param_groups"]
    for ours, theirs in zip(present, groups, strict=True):
        by_place = sorted(ours["params"], key=lambda number: places[names[number]])
        numbers.update(zip(by_place, theirs["params"], strict=True))
    if not all(type(number) is int for number in numbers.values()):
        raise ValueError("the optimizer's parameters have no numbers")
    if len(set(numbers.values())) < len(numbers):
        raise ValueError("the optimizer counts a parameter twice")
    return dict(sorted(numbers.items()))


def _read_group(present: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The present group, with the numbers that the saved one has come to."""
    group = dict(present)
    for name, value in present.items():
        if name in saved and name not in _CONFIGURED and _is_real(value):
            if not _is_real(saved[name]) or not math.isfinite(saved[name]):
                raise ValueError(f"the optimizer's {name} is no number")
            group[name] = saved[name]
    if group["lr"] < 0:
        raise ValueError("the optimizer's lr is negative")
    return group


def _try_step(state: TrainState, config: Config) -> Iterator[Mapping[str, Any]]:
    """What the optimiser keeps of each parameter after a step, by number; of copies."""
    model = deepcopy(state.model)
    optimizer: Optimizer = create_optimizer(model, config.optim, state.learning_rate)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    return iter([optimizer.state[parameter] for parameter in parameters])


def _read_entries(
    name: str, saved: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, Any]:
    """What an optimiser keeps of one parameter; some add entries after their first steps."""
    lost = expected.keys() - saved.keys()
    if lost:
        raise ValueError(f"the optimizer has lost {', '.join(sorted(lost))} of {name}")
    return {
        key: _read_entry(f"{key} of {name}", value, expected.get(key, value))
        for key, value in saved.items()
    }


def _read_entry(what: str, value: Any, expected: Any) -> Any:
    if isinstance(expected, Tensor) and expected.ndim:
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized:
            raise ValueError(f"the optimizer's {what} is no tensor")
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise ValueError(
                f"the optimizer's {what} is {value.dtype} of shape {list(value.shape)} in the "
                f"place of {expected.dtype} of shape {list(expected.shape)}"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"the optimizer's {what} is not finite")
        return value
    if isinstance(expected, Tensor) or _is_real(expected):
        # Counters, which earlier versions of PyTorch kept as numbers.
        number = value.item() if isinstance(value, Tensor) and not value.ndim else value
        if not _is_real(number) or not abs(number) <= _LARGEST_COUNT:
            raise ValueError(f"the optimizer's {what} is no number, or too large")
        if what.startswith("step") and (number < 0 or number != int(number)):
            raise ValueError(f"the optimizer's {what} is no count")
        if isinstance(expected, Tensor):
            return torch.tensor(number, dtype=expected.dtype, device=expected.device)
        return type(expected)(number)
    if type(value) is not type(expected):
        raise ValueError(f"the optimizer's {what} is of another type")
    return value


def _read_schedule(saved: Any, state: TrainState) -> dict[str, Any]:
    """The part of a schedule that does not follow from the epoch."""
    present = schedule_state(state.schedule)
    if not isinstance(saved, Mapping):
        raise ValueError("the schedule's state is none")
    if "plateau" not in present:
        return {}
    _require_like("lr_scheduler", saved, present)
    return dict(saved)


def _require_like(what: str, saved: Any, present: Any) -> None:
    """The same nest, with numbers for numbers."""
    if isinstance(present, Mapping):
        if not isinstance(saved, Mapping) or saved.keys() != present.keys():
            raise ValueError(f"{what} has other entries")
        for key, value in present.items():
            _require_like(f"{what}.{key}", saved[key], value)
    elif isinstance(present, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(present):
            raise ValueError(f"{what} has another length")
        for one, other in zip(saved, present, strict=True):
            _require_like(what, one, other)
    elif _is_real(present):
        # The best of no epoch is infinite.
        if not _is_real(saved) or math.isnan(saved):
            raise ValueError(f"{what} is no number")
    elif type(saved) is not type(present) and present is not None:
        raise ValueError(f"{what} is of another type")


def _read_scaler(saved: Any, state: TrainState, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Empty where the scale begins anew, as it does after a change of precision."""
    present = state.scaler.state_dict()
    if not saved and config.get("amp_dtype") != "float16":
        return {}
    if not isinstance(saved, Mapping):
        raise ValueError("the scaler's state is none")
    if not present:
        return {}
    _require_like("scaler", saved, present)
    if not 0 < saved["scale"] < math.inf:
        raise ValueError("the scaler's scale is no scale")
    return saved


def _require_count(what: str, value: Any, *, least: int = 0, most: int = _LARGEST_COUNT) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is no number from {least} on, or too large")
    return value


def _is_real(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and value.bit_length() < 64
    return isinstance(value, float)
