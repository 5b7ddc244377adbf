"""A CNN in four segments, and Fashion-MNIST."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from flwr_clicooper import SplitTask
from flwr_clicooper.datasets import fashion_mnist
from flwr_clicooper.task import Config, outputs_for

WARM_UP = 0.15


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


class FashionTask(SplitTask):
    """469,546 parameters; the head is small and stays as it was drawn."""

    def segments(self, config: Config) -> list[nn.Module]:
        head = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        first = nn.Sequential(*conv(16, 32), *conv(32, 64), nn.MaxPool2d(2))
        second = nn.Sequential(*conv(64, 128), nn.MaxPool2d(2), nn.Dropout(0.1))
        third = nn.Sequential(
            nn.Flatten(),
            nn.Linear(128 * 9, 320),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(320, outputs_for(10, config)),
        )
        return [head, first, second, third]

    def datasets(self, config: Config) -> tuple[TensorDataset, TensorDataset]:
        return fashion_mnist(config["data-dir"])

    def optimizer(self, segment: nn.Module, config: Config) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            segment.parameters(),
            lr=config["learning-rate"],
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
        )

    def lr_factor(self, progress: float, config: Config) -> float:
        """Rise for the first 15 % of the steps, then fall to zero, both linear."""
        rise = min(1.0, progress / WARM_UP + 0.05)
        return rise * min(1.0, (1.0 - progress) / (1.0 - WARM_UP))
