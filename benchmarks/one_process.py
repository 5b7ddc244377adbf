"""Step times of an un-split model in this process: what a chain is measured against."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from examples.unsplit import train_task_unsplit
from flwr_clicooper import SplitTask


def step_seconds(task: SplitTask, run_config: Mapping[str, Any]) -> list[float]:
    """Return the seconds of each optimizer step, the head's forward pass included."""
    times: list[float] = []
    last = time.perf_counter()

    def note(*_: object) -> None:
        nonlocal last
        now = time.perf_counter()
        times.append(now - last)
        last = now

    train_task_unsplit(task, run_config, on_step=note)
    return times
