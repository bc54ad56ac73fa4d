"""A model measured on every sample exactly once, on any number of ranks."""

from __future__ import annotations

import torch
from torch import nn

from ecoformer.engine.compiling import vary_batch_size
from ecoformer.engine.logs import track
from ecoformer.engine.session import Session
from ecoformer.engine.signals import Request, agree, leave_at_signal
from ecoformer.errors import Preempted
from ecoformer.tasks.base import Metrics


@torch.inference_mode()
def measure(session: Session, network: nn.Module) -> Metrics:
    """Measure a model, compiled or not but not parallel; it is in eval mode afterwards.

    Ranks may have any number of batches, none too: they meet only after the last one. All get the
    same.

    Raises:
        InputError: no rank has a sample.
        NonFiniteError: the model's output is not finite.
        Preempted: a signal asked for it.
    """
    network.eval()
    batches = session.data.eval
    meter = session.task.start_evaluation(session.device)
    call = vary_batch_size(session.compute(network))

    def count() -> None:
        for batch in track(batches, "evaluate", total=len(batches)):
            meter.add(call, session.move(batch))

    leave_at_signal(count)
    if agree() is Request.STOP:
        raise Preempted("stopped in an evaluation")
    return meter.finish()
