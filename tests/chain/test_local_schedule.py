"""The `local` schedule: each trainer by itself, checked against the same done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_clicooper import CooperError, LocalGrid, load_delivered
from flwr_clicooper.split.batches import derive_seed
from tests.tasks import ConvTask, LinearTask, run_local
from tests.test_exactness import ForgetfulGrid

BATCH, ROUNDS, SEED, CLASSES = 16, 3, 7, 4


def by_hand(task: ConvTask) -> dict[str, Tensor]:
    """Greedy training: per round and segment one epoch, then its outputs move on."""
    torch.manual_seed(derive_seed(SEED, "weights"))
    segments = task.segments({})
    torch.manual_seed(derive_seed(SEED, "auxiliary"))
    classifier = nn.Linear(3, CLASSES)
    x, y = task.datasets({})[0].tensors
    with torch.no_grad():
        features = segments[0].eval()(x)
    optimizers = [
        torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
        for parameters in (
            [*segments[1].parameters(), *classifier.parameters()],
            [*segments[2].parameters()],
        )
    ]
    for round_ in range(1, ROUNDS + 1):
        order = np.random.default_rng(derive_seed(SEED, "order", round_)).permutation(len(x))
        given = features
        for index, optimizer in enumerate(optimizers, start=1):
            segments[index].train()
            for step, start in enumerate(range(0, len(x), BATCH)):
                rows = order[start : start + BATCH]
                torch.manual_seed(derive_seed(SEED, "forward", index, round_, step, 0))
                value = segments[index](given[rows].clone())
                scores = classifier(value.mean(dim=(2, 3))) if index == 1 else value
                functional.cross_entropy(scores, y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                given = segments[index].eval()(given.clone())
    return nn.Sequential(*segments).state_dict()


@pytest.mark.parametrize("grid_class", [LocalGrid, ForgetfulGrid])
def test_local_training_equals_the_same_by_hand(
    grid_class: type[LocalGrid], tmp_path: Path
) -> None:
    task = ConvTask()
    options: dict[str, Any] = {"batch_size": BATCH, "num_rounds": ROUNDS, "seed": SEED}
    result = run_local(task, 2, tmp_path, grid_class, schedule="local", **options)
    assert result.run_dir
    delivered = load_delivered(result.run_dir, task).state_dict()
    expected = by_hand(task)
    assert delivered.keys() == expected.keys()  # the auxiliary classifier stays behind
    for name, value in expected.items():
        assert torch.allclose(delivered[name], value, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("trainers", [1, 3])
def test_local_training_learns(trainers: int, tmp_path: Path) -> None:
    task = LinearTask(trainers)
    options: dict[str, Any] = {"num_rounds": 15, "learning_rate": 0.3}
    result = run_local(task, trainers, tmp_path, schedule="local", **options)
    assert result.evaluate_metrics_clientapp[15]["accuracy"] > 0.8


class Tokens(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        unfold = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (4, 2)))
        return [unfold, nn.Linear(2, 5), nn.Sequential(nn.Flatten(), nn.Linear(20, 3))]


class Scalar(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        return [nn.Linear(4, 8), nn.Linear(8, 8), nn.Unflatten(1, (4, 2))]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.mean()


def test_sequences_are_averaged_over_their_tokens(tmp_path: Path) -> None:
    run_local(Tokens(2), 2, tmp_path, schedule="local")


def test_a_model_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CooperError, match="one row of scores per record"):
        run_local(Scalar(2), 2, tmp_path, schedule="local")
