"""The quickstart's CNN, cut for 1 to 4 trainers."""

from itertools import chain, pairwise

import torch
from torch import nn
from torch.utils.data import TensorDataset

from flwr_clicooper import SplitTask
from flwr_clicooper.datasets import fashion_mnist
from flwr_clicooper.task import Config

CUTS = {1: [], 2: [2], 3: [2, 3], 4: [1, 2, 3]}
"""Before which of the four blocks a new trainer begins; with 3 it is the quickstart."""


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


class ThroughputTask(SplitTask):
    """Head and four blocks; ``task.trainers`` and ``task.records`` are in the run config."""

    def segments(self, config: Config) -> list[nn.Module]:
        head = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        blocks: list[list[nn.Module]] = [
            conv(16, 32),
            [*conv(32, 64), nn.MaxPool2d(2)],
            [*conv(64, 128), nn.MaxPool2d(2), nn.Dropout(0.1)],
            [
                nn.Flatten(),
                nn.Linear(128 * 9, 320),
                nn.ReLU(),
                nn.Dropout(0.1),
                nn.Linear(320, 10),
            ],
        ]
        bounds = [0, *CUTS[config["task.trainers"]], len(blocks)]
        parts = [blocks[a:b] for a, b in pairwise(bounds)]
        return [head, *(nn.Sequential(*chain.from_iterable(part)) for part in parts)]

    def datasets(self, config: Config) -> tuple[TensorDataset, TensorDataset]:
        train, test = fashion_mnist(config["data-dir"])
        return TensorDataset(*(t[: config["task.records"]] for t in train.tensors)), test

    def optimizer(self, segment: nn.Module, config: Config) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            segment.parameters(), lr=config["learning-rate"], momentum=0.9, nesterov=True
        )
