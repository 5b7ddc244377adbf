"""Runs whose steps can be repeated, with segments that are large enough for a watermark."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flwr_clicooper import LocalGrid, SplitTask
from flwr_clicooper.chain.audit import Auditor, audit_run
from flwr_clicooper.provenance.audit import AuditReport, Challenge, Outcome, Point
from flwr_clicooper.provenance.evidence import load_run
from flwr_clicooper.provenance.watermark import WEIGHTS
from tests.tasks import LinearTask, run_local

WIDTH = math.isqrt(WEIGHTS - 1) + 1


class WideTask(LinearTask):
    """Segments that just carry a watermark, with all that makes repeating hard."""

    def segments(self, config: Any) -> list[nn.Module]:
        def wide() -> list[nn.Module]:
            return [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.1)]

        middle = [nn.Sequential(*wide()) for _ in range(self.trainers - 1)]
        last = nn.Sequential(*wide(), nn.Linear(WIDTH, self.classes))
        tail = (
            [nn.Linear(self.classes, self.classes)] if config["label-side"] == "owner" else []
        )
        return [nn.Linear(4, WIDTH), *middle, last, *tail]

    def optimizer(self, segment: nn.Module, config: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(segment.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

    def lr_factor(self, progress: float, config: Any) -> float:
        return 1.0 - progress / 2


STEPS, EVERY = 8, 3  # 96 records in batches of 12; states before steps 0, 3, 6, and at 8


def wide_run(
    run_dir: Path,
    task: SplitTask | None = None,
    trainers: int = 2,
    grid_class: type[LocalGrid] = LocalGrid,
    **options: Any,
) -> Path:
    """Train two rounds; return the run's folder, whose evidence `verify_run` found to hold."""
    options = {"num_rounds": 2, "batch_size": 12, "audit_every": EVERY} | options
    result = run_local(task or WideTask(trainers), trainers, run_dir, grid_class, **options)
    assert result.run_dir is not None
    return result.run_dir


def audit_all(run_dir: Path, task: SplitTask, **more: Any) -> AuditReport:
    """Repeat every step of a run."""
    return audit_run(run_dir, task, Challenge.draw(load_run(run_dir), 1000), **more)


def audit_one(
    run_dir: Path, task: SplitTask, point: Point, evidence: Path | None = None, **more: Any
) -> Outcome:
    """Repeat the steps of one point."""
    run = load_run(run_dir)
    challenge = Challenge.draw(run, 1000)
    return Auditor(run, task, challenge, evidence or run_dir, **more).audit(point)
