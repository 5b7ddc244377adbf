"""Small tasks that tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flwr_clicooper import CooperStrategy, LocalGrid, SplitTask, cooper_client
from flwr_clicooper.chain.strategy import CooperResult
from flwr_clicooper.provenance.verify import verify_run


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution with everything that makes exactness hard."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
    )


def classifier(inputs: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(inputs * 36, classes))


class ConvTask(SplitTask):
    """A head, ``middle`` blocks and a classifier on random 6x6 images."""

    def __init__(self, middle: int = 1, records: int = 77) -> None:
        self.middle = middle
        self.records = records

    def segments(self, config: Any) -> list[nn.Module]:
        return [block(1, 3), *(block(3, 3) for _ in range(self.middle)), classifier(3, 4)]

    def datasets(self, config: Any) -> tuple[TensorDataset, TensorDataset]:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(self.records + 40, 1, 6, 6, generator=generator)
        y = torch.randint(0, 4, (self.records + 40,), generator=generator)
        cut = self.records
        return TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])

    def optimizer(self, segment: nn.Module, config: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(segment.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class LinearTask(SplitTask):
    """The smallest task: a head and ``trainers`` segments on separable points."""

    def __init__(self, trainers: int = 1, classes: int = 3) -> None:
        self.trainers = trainers
        self.classes = classes

    def segments(self, config: Any) -> list[nn.Module]:
        middle = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(self.trainers - 1)]
        return [nn.Linear(4, 8), *middle, nn.Linear(8, self.classes)]

    def data(self, records: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(records, 4, generator=generator)
        return x, x[:, : self.classes].argmax(dim=1)

    def datasets(self, config: Any) -> tuple[TensorDataset, TensorDataset]:
        return TensorDataset(*self.data(96, 0)), TensorDataset(*self.data(64, 1))


class Counter(nn.Module):
    """Counts forward passes of training in a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return x * (1 + self.count / 10)


def nodes(trainers: int, standbys: int = 0) -> list[dict[str, Any]]:
    """Node configs of a whole chain."""
    chain = [{"role": "trainer", "stage": i} for i in range(1, trainers + 1)]
    return [{"role": "owner"}, *chain, *({"role": "trainer"} for _ in range(standbys))]


def run_local(
    task: SplitTask,
    trainers: int,
    run_dir: Path,
    grid_class: type[LocalGrid] = LocalGrid,
    **options: Any,
) -> CooperResult:
    """Train over a LocalGrid; options have underscores for dashes."""
    config = {"release": "clean", "num-rounds": 1, "batch-size": 16, "run-dir": str(run_dir)}
    config["link"] = "mailbox"  # a LocalGrid that is not warm would wait for its own clients
    config |= {key.replace("_", "-"): value for key, value in options.items()}
    grid = grid_class(cooper_client(task), nodes(trainers), config)
    return verified(CooperStrategy.from_config(config).start(grid))


def verified(result: CooperResult) -> CooperResult:
    """Return a result whose evidence holds, if the run left any."""
    assert result.run_dir is not None
    if result.provenance:
        failed = verify_run(result.run_dir).failed
        assert not failed, failed
    return result


def step_losses(run_dir: Path) -> list[float]:
    """The loss of each optimizer step of a run."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "step"]
