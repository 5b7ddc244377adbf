"""In which order a stage works on the micro-batches of one optimizer step."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Pass(Enum):
    """What a stage does with a micro-batch; the last stage does all at once."""

    FORWARD = "forward"
    BACKWARD = "backward"
    LOSS = "forward, loss and backward"


class Operation(NamedTuple):
    """One pass of one micro-batch."""

    kind: Pass
    microbatch: int


def stage_order(pipeline: str, stage: int, stages: int, microbatches: int) -> list[Operation]:
    """Return what a stage does in one optimizer step, in order.

    Backward passes come in the order of micro-batches in both pipelines, so gradients
    accumulate in the same order and the results are equal to the bit.

    Parameters
    ----------
    pipeline : str
        ``gpipe``: all forward passes, then all backward passes (Huang et al., 2019).
        ``1f1b``: as many forward passes as there are stages after this one, then one
        forward and one backward in turn (Narayanan et al., 2021), so that no stage
        keeps more micro-batches than it must.
    stage, stages : int
        Place of the stage, from 0, and number of stages.
    microbatches : int
        Micro-batches in this step.
    """
    if stage == stages - 1:
        return [Operation(Pass.LOSS, m) for m in range(microbatches)]
    forwards = [Operation(Pass.FORWARD, m) for m in range(microbatches)]
    backwards = [Operation(Pass.BACKWARD, m) for m in range(microbatches)]
    if pipeline == "gpipe":
        return forwards + backwards
    ahead = min(microbatches, stages - 1 - stage)
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[microbatches - ahead :]
