"""Measuring a model on the owner's held-out records."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flwr_clicooper.split.specs import Tensors
from flwr_clicooper.task import SplitTask


def measure(
    task: SplitTask, model: nn.Module, inputs: Tensors, labels: Tensor, device: torch.device
) -> tuple[float, float]:
    """Return the sum over records of the loss, and of what is right."""
    records = len(labels)
    with torch.no_grad():
        outputs = model(*(x.to(device) for x in inputs)).cpu()
    loss = float(task.loss(outputs, labels)) * records
    if not task.measures_accuracy:
        return loss, 0.0
    right = task.correct(outputs, labels).reshape(records, -1)
    return loss, float(right.float().mean(dim=1).sum())


def held_out_metrics(
    task: SplitTask,
    model: nn.Module,
    batches: Iterator[tuple[Tensors, Tensor]],
    device: torch.device,
) -> dict[str, float]:
    """Return mean loss and, where the task has it, accuracy over batches of records."""
    model.to(device)
    records, loss, correct = 0, 0.0, 0.0
    for inputs, labels in batches:
        sums = measure(task, model, inputs, labels, device)
        loss, correct, records = loss + sums[0], correct + sums[1], records + len(labels)
    accuracy = {"accuracy": correct / records} if task.measures_accuracy else {}
    return {**accuracy, "loss": loss / records}
