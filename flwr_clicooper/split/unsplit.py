"""The same model trained in one process: what the chain must equal.

One autograd graph over the whole model, no messages, no `Segment`. It follows the
run's public order of records and seeds dropout by position, as the chain does, so
losses and weights can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_clicooper.split.batches import BatchPlan, Position, derive_seed
from flwr_clicooper.split.modules import seeded
from flwr_clicooper.split.segment import Loss, step_optimizer
from flwr_clicooper.split.specs import Tensors, as_tensors

Fetch = Callable[[Position], tuple[Tensors, Tensor]]


class Chain(nn.Sequential):
    """Segments one after the other; tuples between them become positional arguments."""

    def forward(self, *inputs: Any) -> Any:
        """Return what the last segment gives for the head's inputs."""
        value: Any = inputs
        for segment in self:
            value = segment(*value) if isinstance(value, (tuple, list)) else segment(value)
        return value


def train_unsplit(
    segments: Sequence[nn.Module],
    optimizers: Sequence[Optimizer | None],
    fetch: Fetch,
    loss: Loss,
    plan: BatchPlan,
    rounds: int,
    *,
    frozen_head: bool,
    lr_factor: Callable[[float], float] = lambda _: 1.0,
    on_step: Callable[[Position, float], None] | None = None,
) -> list[float]:
    """Train segments in one process as the lockstep schedule trains them in a chain.

    Parameters
    ----------
    segments : sequence of nn.Module
        Trained in place.
    optimizers : sequence of Optimizer or None
        One per segment.
    fetch : callable
        Returns the inputs and labels of a micro-batch.
    loss : callable
        Mean loss of (outputs, labels).
    plan : BatchPlan
        Order and sizes of batches.
    rounds : int
        Epochs.
    frozen_head : bool
        Whether the first segment only computes, in eval mode (release `clean`).
    lr_factor : callable
        Multiple of the learning rate for the share of steps done.
    on_step : callable, optional
        Called with the position and loss of each step.

    Returns
    -------
    list of float
        The loss of each optimizer step.
    """
    for place, segment in enumerate(segments):
        segment.train(not (frozen_head and place == 0))
    losses = []
    for round_ in range(1, rounds + 1):
        for step in range(plan.steps):
            total = 0.0
            for microbatch in range(plan.parts(step)):
                at = Position(round_, step, microbatch)
                inputs, labels = fetch(at)
                outputs = _forward(segments, inputs, at, plan.seed, frozen_head)
                value = loss(outputs, labels)
                torch.autograd.backward(value * plan.weight(at))
                total += float(value.detach()) * plan.weight(at)
            factor = lr_factor(plan.progress(Position(round_, step, 0), rounds))
            for optimizer in optimizers:
                step_optimizer(optimizer, factor)
            losses.append(total)
            if on_step is not None:
                on_step(Position(round_, step, 0), total)
    return losses


def _forward(
    segments: Sequence[nn.Module], values: Tensors, at: Position, seed: int, frozen: bool
) -> Tensors:
    for index, segment in enumerate(segments):
        place = (index, at.round, at.step, at.microbatch)
        with seeded(derive_seed(seed, "forward", *place)):
            with torch.set_grad_enabled(not (frozen and index == 0)):
                values = as_tensors(segment(*values), f"segment {index}")
    return values
