"""The exactness gate over live links, a process per party."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live_process import ProcessGrid
from tests.tasks import run_local
from tests.test_exactness import BATCH, ROUNDS, SEED, check, reference, task_for


@pytest.mark.parametrize(
    ("release", "label_side", "microbatches", "pipeline", "trainers"),
    [
        ("clean", "trainer", 1, "1f1b", 1),
        ("clean", "trainer", 4, "1f1b", 2),
        ("clean", "owner", 1, "gpipe", 2),
        ("interactive", "trainer", 4, "gpipe", 2),
        ("interactive", "owner", 4, "1f1b", 2),
        ("interactive", "trainer", 1, "1f1b", 4),
    ],
)
def test_chain_over_live_links_equals_one_process(
    release: str,
    label_side: str,
    microbatches: int,
    pipeline: str,
    trainers: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = task_for(trainers, label_side)
    result = run_local(
        task,
        trainers,
        tmp_path,
        ProcessGrid,
        link="live",
        release=release,
        label_side=label_side,
        microbatches=microbatches,
        pipeline=pipeline,
        batch_size=BATCH,
        num_rounds=ROUNDS,
        seed=SEED,
        **{"task.middle": task.middle},
    )
    assert "Live links to all parties" in caplog.text
    losses, weights = reference(task, release, microbatches)
    assert result.run_dir is not None
    check(result.run_dir, task, losses, weights)
