from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flwr_clicooper.split.batches import BatchPlan, derive_seed
from flwr_clicooper.split.unsplit import train_unsplit
from tests.tasks import ConvTask, run_local, step_losses


class Decaying(ConvTask):
    def lr_factor(self, progress: float, config: object) -> float:
        return 1.0 - progress


@pytest.mark.parametrize("release", ["clean", "interactive"])
def test_the_reference_that_users_get_equals_the_chain(release: str, tmp_path: Path) -> None:
    task = Decaying()
    options = {"release": release, "num_rounds": 2, "microbatches": 2, "batch_size": 8}
    result = run_local(task, 2, tmp_path, **options)
    assert result.run_dir
    plan = BatchPlan(records=77, batch_size=8, microbatches=2, seed=0, shuffle=True)
    x, y = task.datasets({})[0].tensors
    torch.manual_seed(derive_seed(0, "weights"))
    segments = task.segments({})
    optimizers = [task.optimizer(segment, {}) for segment in segments]
    losses = train_unsplit(
        segments,
        [None if release == "clean" else optimizers[0], *optimizers[1:]],
        lambda at: ((x[plan.indices(at)],), y[plan.indices(at)]),
        lambda outputs, labels: task.loss(outputs[0], labels),
        plan,
        rounds=2,
        frozen_head=release == "clean",
        lr_factor=lambda progress: task.lr_factor(progress, {}),
    )
    assert step_losses(result.run_dir) == pytest.approx(losses, abs=1e-6)
