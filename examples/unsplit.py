"""Train a task's model in one process, un-split: what the chain must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flwr_clicooper import SplitTask
from flwr_clicooper.chain.build import build_optimizer, build_segments
from flwr_clicooper.chain.records import LabelledSet
from flwr_clicooper.options import Options, task_config
from flwr_clicooper.split.batches import BatchPlan, Position
from flwr_clicooper.split.specs import Tensors
from flwr_clicooper.split.unsplit import Chain, train_unsplit


def train_task_unsplit(
    task: SplitTask,
    run_config: Mapping[str, Any],
    on_step: Callable[[Position, float], None] | None = None,
) -> tuple[Chain, list[float], float]:
    """Train with the seed, steps and batches that a chain with this run config has.

    Returns
    -------
    model : Chain
        In eval mode.
    losses : list of float
        One per optimizer step.
    accuracy : float
        On the held-out set.
    """
    options, config = Options.from_config(run_config), task_config(run_config, {})
    segments = build_segments(task, config)
    optimizers = [build_optimizer(task, segment, config) for segment in segments]
    if not options.head_trains:
        optimizers[0] = None
    train, test = (LabelledSet(part, "given") for part in task.datasets(config))
    plan = BatchPlan(
        train.records,
        options.batch_size,
        options.microbatches,
        options.seed,
        options.shuffle,
    )

    def loss(outputs: Tensors, labels: Tensor) -> Tensor:
        return task.loss(outputs[0], labels)

    losses = train_unsplit(
        segments,
        optimizers,
        lambda at: train.fetch(plan.indices(at)),
        loss,
        plan,
        options.num_rounds,
        frozen_head=not options.head_trains,
        lr_factor=lambda progress: task.lr_factor(progress, config),
        on_step=on_step,
    )
    model = Chain(*segments).eval()
    correct = 0.0
    with torch.no_grad():
        for start in range(0, test.records, options.batch_size):
            stop = min(start + options.batch_size, test.records)
            inputs, labels = test.fetch(torch.arange(start, stop).numpy())
            correct += float(task.correct(model(*inputs), labels).float().sum())
    return model, losses, correct / test.records
