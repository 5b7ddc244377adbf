"""The vertical example, in one process. Statistical tests state their false-alarm rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from scipy.stats import kstest

from examples.vertical.vertical import client_app, server_app, task
from flwr_clicooper import LocalGrid
from flwr_clicooper.datasets import uci_adult
from flwr_clicooper.privacy.accounting import noise_for

FALSE_ALARM = 1e-6
RECORDS = 8192


def grid_of(app: ClientApp) -> LocalGrid:
    nodes = [{"partition-id": 0}, {"partition-id": 1}]
    return LocalGrid(app, nodes, {"records": RECORDS})


def without_mod() -> ClientApp:
    app = ClientApp()
    app.query("generate_embeddings")(client_app.generate_embeddings)
    app.train("apply_gradients")(client_app.apply_gradients)
    return app


def ask(grid: LocalGrid, batch: Any, kind: str = "query.generate_embeddings") -> Message:
    content = RecordDict({"config": ConfigRecord({"batch": batch})})
    content["gradients"] = ArrayRecord([torch.ones(task.BATCH, task.EMBEDDING).numpy()])
    (reply,) = grid.send_and_receive([Message(content, 101, kind)])
    return reply


def embeddings(reply: Message) -> torch.Tensor:
    return torch.from_numpy(reply.content.array_records["embeddings"]["0"].numpy())


def test_the_embedded_data_is_uci_adult() -> None:
    data = uci_adult()
    assert data["x_train"].shape == (32561, 14)
    assert data["x_test"].shape == (16281, 14)
    assert data["y_test"].mean() == pytest.approx(0.2362, abs=1e-4)
    assert not set(task.HOLDERS[0]) & set(task.HOLDERS[1])
    assert set(task.HOLDERS[0] + task.HOLDERS[1]) < set(data["columns"].tolist())


def test_it_learns_more_than_the_majority_class_without_the_mod() -> None:
    held_out = task.labels(RECORDS)[-1]
    accuracy, auc = server_app.learn(grid_of(without_mod()), RECORDS)
    assert accuracy > 1 - float(held_out.mean()) + 0.02
    assert auc > 0.8


def test_all_epochs_fit_the_budget_and_nothing_after_them() -> None:
    grid = grid_of(client_app.app)
    accuracy, auc = server_app.learn(grid, RECORDS)
    assert 0.7 < accuracy < 0.8
    assert 0.5 < auc < 0.8
    for batch in (0, len(task.labels(RECORDS)) - 1):  # training and held-out records
        assert "PrivacyBudgetExceeded" in ask(grid, batch).error.reason
    assert "PrivacyBudgetExceeded" in ask(grid, 0, "train.apply_gradients").error.reason


def test_the_noise_is_on_the_wire() -> None:
    plain, noised = (
        embeddings(ask(grid_of(app), 0)) for app in (without_mod(), client_app.app)
    )
    sigma = noise_for(task.EMBEDDINGS_EPSILON, task.DELTA, 2.0, task.EPOCHS)
    clipped = plain / plain.norm(dim=1, keepdim=True).clamp_min(1.0)
    noise = (noised - clipped).numpy().ravel() / sigma
    assert kstest(noise, "norm").pvalue > FALSE_ALARM
    assert kstest((noised - clipped).numpy().ravel() / sigma * 1.3, "norm").pvalue < 1e-3


def test_an_encoder_step_has_noise_of_its_own() -> None:
    grids = [grid_of(without_mod()) for _ in range(2)]
    for grid in grids:
        assert not ask(grid, 0, "train.apply_gradients").has_error()
    one, other = (embeddings(ask(grid, 0)) for grid in grids)
    assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("batch", [-1, -17, 17, True])
def test_a_batch_has_one_name(batch: Any) -> None:
    """A second name for the same records would be a second budget."""
    grid = grid_of(client_app.app)
    if batch is True:
        replies = [ask(grid, name) for name in (1, True, 1)]
        assert "PrivacyBudgetExceeded" in replies[-1].error.reason
    else:
        assert ask(grid, batch).has_error()


def test_the_statement_has_the_epsilon_of_both_releases_together() -> None:
    text = server_app.statement()
    assert "for at most 2 release(s)" in text
    assert "(7.95, 1e-05) per record of a holder" in text
    assert "(12.2, 1e-05) for a person's records at both holders" in text
