"""The exactness gate: a chain computes what one process computes.

The reference below is written out longhand: one autograd graph over the whole model,
one optimizer over all parameters. It shares with the chain only the public contract of
the run's seed (initial weights, order of records, dropout by position).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from flwr_clicooper import CooperError, LocalGrid, load_delivered
from flwr_clicooper.chain.serve import CACHE
from flwr_clicooper.split.batches import derive_seed
from tests.tasks import ConvTask, run_local, step_losses

BATCH, ROUNDS, SEED = 8, 2, 3


def reference(
    task: ConvTask, release: str, microbatches: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(derive_seed(SEED, "weights"))
    model = nn.Sequential(*task.segments({}))
    model.train()
    if release == "clean":
        model[0].eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=1e-3)
    x, y = task.datasets({})[0].tensors
    losses = []
    for round_ in range(1, ROUNDS + 1):
        order = np.random.default_rng(derive_seed(SEED, "order", round_)).permutation(len(x))
        for step, start in enumerate(range(0, len(x), BATCH)):
            rows = order[start : start + BATCH]
            total = 0.0
            parts = np.array_split(rows, min(microbatches, len(rows)))
            for part, indices in enumerate(parts):
                value = x[indices]
                for index, segment in enumerate(model):
                    torch.manual_seed(derive_seed(SEED, "forward", index, round_, step, part))
                    value = segment(value)
                loss = functional.cross_entropy(value, y[indices])
                share = len(indices) / len(rows)
                (loss * share).backward()
                total += loss.item() * share
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    assert len(losses) >= 20
    return losses, model.state_dict()


def check(
    run_dir: Path, task: ConvTask, losses: list[float], weights: dict[str, torch.Tensor]
) -> None:
    found = step_losses(run_dir)
    assert len(found) == len(losses)
    assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) <= 1e-6
    delivered = load_delivered(run_dir, task).state_dict()
    assert delivered.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.allclose(delivered[name], value, rtol=0, atol=1e-6), name


class ForgetfulGrid(LocalGrid):
    """Every message meets a new process: nothing but files survives between two."""

    warm = False

    def push_messages(self, messages: Any) -> Any:
        CACHE.clear()
        return super().push_messages(messages)


class TwoProcessGrid(LocalGrid):
    """Every message meets one of two processes, which both remember what they did."""

    warm = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.choose = random.Random(0)
        self.processes: list[dict[Any, Any]] = [{}, {}]

    def push_messages(self, messages: Any) -> Any:
        CACHE._workers = self.choose.choice(self.processes)
        return super().push_messages(messages)


def task_for(trainers: int, label_side: str) -> ConvTask:
    return ConvTask(middle=trainers - (label_side == "trainer"))


@pytest.mark.parametrize("trainers", [1, 2, 4])
@pytest.mark.parametrize("pipeline", ["gpipe", "1f1b"])
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("label_side", ["trainer", "owner"])
@pytest.mark.parametrize("release", ["clean", "interactive"])
def test_chain_equals_one_process(
    release: str,
    label_side: str,
    microbatches: int,
    pipeline: str,
    trainers: int,
    tmp_path: Path,
) -> None:
    task = task_for(trainers, label_side)
    result = run_local(
        task,
        trainers,
        tmp_path,
        release=release,
        label_side=label_side,
        microbatches=microbatches,
        pipeline=pipeline,
        batch_size=BATCH,
        num_rounds=ROUNDS,
        seed=SEED,
    )
    losses, weights = reference(task, release, microbatches)
    assert result.run_dir is not None
    check(result.run_dir, task, losses, weights)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("label_side", ["trainer", "owner"])
@pytest.mark.parametrize("release", ["clean", "interactive"])
@pytest.mark.parametrize("grid_class", [ForgetfulGrid, TwoProcessGrid])
def test_it_does_not_matter_which_process_serves_a_message(
    grid_class: type[LocalGrid],
    release: str,
    label_side: str,
    microbatches: int,
    tmp_path: Path,
) -> None:
    task = task_for(2, label_side)
    result = run_local(
        task,
        2,
        tmp_path,
        grid_class,
        release=release,
        label_side=label_side,
        microbatches=microbatches,
        batch_size=BATCH,
        num_rounds=ROUNDS,
        seed=SEED,
    )
    losses, weights = reference(task, release, microbatches)
    assert result.run_dir is not None
    check(result.run_dir, task, losses, weights)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "RMSprop", "LBFGS"])
def test_the_state_of_other_optimizers_survives_a_new_process(
    name: str, tmp_path: Path
) -> None:
    class Task(ConvTask):
        def optimizer(self, segment: nn.Module, config: Any) -> Any:
            return getattr(torch.optim, name)(segment.parameters(), lr=0.01)

    options: dict[str, Any] = {"batch_size": BATCH, "microbatches": 2}
    if name == "LBFGS":  # needs a closure, which a chain cannot give
        with pytest.raises(CooperError, match=r"trainer 2 .*TypeError"):
            run_local(Task(), 2, tmp_path, ForgetfulGrid, **options)
        return
    runs = [run_local(Task(), 2, tmp_path, g, **options) for g in (LocalGrid, ForgetfulGrid)]
    plain, forgetful = (step_losses(r.run_dir) for r in runs if r.run_dir)
    assert forgetful == pytest.approx(plain, abs=1e-6)
