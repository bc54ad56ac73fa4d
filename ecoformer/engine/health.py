"""What notices a number that is not finite, and reports where it came from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ecoformer.engine.session import Session
from ecoformer.engine.state import TrainState
from ecoformer.errors import InputError, NonFiniteError
from ecoformer.files import write_text
from ecoformer.ranks import gather_objects, is_main, max_over_ranks

NON_FINITE_REPORT = "non_finite.json"

# Below this scale a gradient of one vanishes in float16: what overflows is not the scale's doing.
_SMALLEST_SCALE = 2.0**-24
_NEVER = 2**62

_logger = logging.getLogger(__name__)


class Health:
    """Stops all ranks at one step when a loss or gradient is not finite.

    The outcome of a step is read after the next one has been queued, so the device never waits
    for the host. Ranks tell each other where they meet anyway, by ``is_bad``. Nothing is saved
    before ``finish``.
    """

    def __init__(self, state: TrainState, device: torch.device) -> None:
        self._loss = self._scale = math.nan
        self._bad_step = _NEVER
        self._state = state
        self._is_cuda = device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event | None, int] | None = None

    def __str__(self) -> str:
        if math.isnan(self._loss):
            return ""
        return f"loss {self._loss:.4f} lr {self._state.learning_rate:.3g}"

    @property
    def is_bad(self) -> bool:
        """Whether a step that was looked at was not finite on this rank."""
        return self._bad_step != _NEVER

    def check(self, loss: Tensor, norm: Tensor) -> None:
        """Queue the outcome of the step just done, both [], and look at the one before."""
        state, loss = self._state, loss.detach()
        is_bad = ~loss.isfinite()
        if not state.scaler.is_enabled():
            # With a scaler, a gradient that overflows only lowers the scale.
            is_bad |= ~norm.isfinite()
        scale = state.scaler.scale(torch.ones_like(loss))
        outcome = torch.stack([loss, is_bad.to(loss.dtype), scale])
        self._look()
        outcome = outcome.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if self._is_cuda else None
        self._pending = outcome, event, state.step - 1

    def _look(self) -> None:
        if self._pending is None:
            return
        outcome, event, step = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        self._loss, is_bad, self._scale = outcome.tolist()
        if is_bad or self._scale < _SMALLEST_SCALE:
            self._bad_step = min(self._bad_step, step)

    def finish(self) -> None:
        """Look at the last outcome that is queued; every rank must ask.

        Raises:
            NonFiniteError: one was not finite on some rank, or the loss scale has run out.
        """
        self._look()
        step = -max_over_ranks(-self._bad_step)
        if step != _NEVER:
            raise NonFiniteError(
                f"the loss or a gradient is not finite at epoch {self._state.epoch}, step {step}, "
                f"learning rate {self._state.learning_rate:g}, loss scale {self._scale:g}; the "
                "last checkpoint is untouched. Try a lower --lr, --clip-grad, or --amp-dtype "
                "bfloat16.",
                step=step,
                loss_scale=self._scale,
            )


@contextmanager
def report_non_finite(session: Session, state: TrainState) -> Iterator[None]:
    """Write what it takes to repeat the step that failed in a block, on all ranks together."""
    try:
        yield
    except NonFiniteError as error:
        _write_report(error, session, state)
        raise


def _write_report(error: NonFiniteError, session: Session, state: TrainState) -> None:
    assert session.data.train is not None
    epoch, step = state.epoch, error.step
    # Evaluations and saves find what the last step left, which may be that of the epoch before.
    if step is None:
        epoch = max(0, epoch - (state.step == 0))
        step = (state.step or len(session.data.train)) - 1
    samples = gather_objects(session.task.name_samples(epoch, step))
    report = {
        "error": str(error),
        "epoch": epoch,
        "step": step,
        "learning_rate": state.learning_rate if epoch == state.epoch else None,
        "loss_scale": error.loss_scale or state.scaler.get_scale(),
        "seed": session.config.run.seed,
        # A list a rank.
        **{key: [named[key] for named in samples] for key in samples[0]},
    }
    if is_main():
        path = session.folder / NON_FINITE_REPORT
        try:
            write_text(path, json.dumps(report, indent=1) + "\n")
            _logger.info("what it takes to repeat the step is in %s", path)
        except InputError as failure:
            _logger.warning("%s", failure)
