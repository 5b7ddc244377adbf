"""Whole runs over a LocalGrid: who is asked what, and what comes out."""

from __future__ import annotations

import json
import random
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flwr_clicooper import CooperStrategy, LocalGrid, SplitTask, cooper_client, load_delivered
from flwr_clicooper.chain.serve import CACHE
from flwr_clicooper.errors import CooperError, DeliveryError, OptionError
from tests.tasks import Counter, LinearTask, nodes, run_local, step_losses, verified
from tests.test_exactness import ForgetfulGrid


class Wire:
    """A mod that notes every message: node, action, and names of records both ways."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, set[str], set[str]]] = []

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        asked = set(message.content.array_records)
        reply = call_next(message, context)
        told = set(reply.content.array_records)
        action = message.metadata.message_type
        self.seen.append((context.node_id, action, asked, told))
        return reply


def run(
    run_dir: Path, task: SplitTask, trainers: int = 2, **options: Any
) -> tuple[Wire, LocalGrid, Any]:
    wire = Wire()
    config = {"release": "clean", "num-rounds": 2, "batch-size": 32, "run-dir": str(run_dir)}
    config |= {k.replace("_", "-"): v for k, v in options.items()}
    grid = LocalGrid(cooper_client(task, mods=[wire]), nodes(trainers, 1), config)
    return wire, grid, verified(CooperStrategy.from_config(config).start(grid))


OWNER, FIRST, LAST, STANDBY = 101, 102, 103, 104


# -- who is asked what -----------------------------------------------------------------


def test_clean_release_happens_once_and_the_owner_may_then_leave(tmp_path: Path) -> None:
    wire, _, _ = run(tmp_path, LinearTask(2))
    owner = [action for node, action, _, _ in wire.seen if node == OWNER]
    assert owner == [
        "query.hello",
        "train.setup",
        "train.agree",
        "train.release",
        "query.hello",  # is it there to take delivery?
        "train.collect",
        "train.collect",
        "evaluate.delivered",
        "train.finish",
    ]
    training = [a for _, a, _, _ in wire.seen]
    first, last = training.index("train.forward"), training.index("query.hello", 5)
    assert last > first
    assert all(node != OWNER for node, _, _, _ in wire.seen[first:last])


def test_no_gradient_reaches_the_owner_in_clean_mode(tmp_path: Path) -> None:
    wire, _, _ = run(tmp_path, LinearTask(2))
    first = [
        told
        for node, action, _, told in wire.seen
        if (node, action) == (FIRST, "train.backward")
    ]
    assert first
    assert all("gradients" not in told for told in first)
    assert all("gradients" not in asked for node, _, asked, _ in wire.seen if node == OWNER)


def test_interactive_brings_every_gradient_back_to_the_owner(tmp_path: Path) -> None:
    wire, _, _ = run(tmp_path, LinearTask(2), release="interactive")
    backward = [asked for n, a, asked, _ in wire.seen if (n, a) == (OWNER, "train.backward")]
    assert backward == [{"gradients"}] * 6


@pytest.mark.parametrize("release", ["clean", "interactive"])
def test_labels_go_to_the_last_trainer_only(release: str, tmp_path: Path) -> None:
    wire, _, _ = run(tmp_path, LinearTask(2), release=release)
    takers = {node for node, _, asked, _ in wire.seen if "labels" in asked}
    assert takers == {LAST}


@pytest.mark.parametrize("release", ["clean", "interactive"])
def test_labels_never_leave_in_the_u_shape(release: str, tmp_path: Path) -> None:
    wire, _, _ = run(tmp_path, LinearTask(3), release=release, label_side="owner")
    assert all("labels" not in asked | told for _, _, asked, told in wire.seen)


def test_a_standby_is_asked_who_it_is_and_nothing_else(tmp_path: Path) -> None:
    wire, _, result = run(tmp_path, LinearTask(2))
    assert [a for node, a, _, _ in wire.seen if node == STANDBY] == ["query.hello"]
    parties = tomllib.loads((result.run_dir / "run.toml").read_text())["parties"]
    assert parties["standbys"] == [str(STANDBY)]


def test_simulated_nodes_get_their_role_from_their_partition(tmp_path: Path) -> None:
    config = {"release": "clean", "num-rounds": 1, "run-dir": str(tmp_path)}
    partitions = [{"partition-id": i, "num-partitions": 4} for i in (2, 0, 3, 1)]
    grid = LocalGrid(cooper_client(LinearTask(2)), partitions, config)
    result = CooperStrategy.from_config(config).start(grid)
    parties = tomllib.loads((result.run_dir / "run.toml").read_text())["parties"]
    assert parties == {"owner": "102", "trainers": ["104", "101"], "standbys": ["103"]}


def test_too_few_simulated_nodes_are_told_how_many_are_needed(tmp_path: Path) -> None:
    config = {"release": "clean", "run-dir": str(tmp_path)}
    partitions = [{"partition-id": i, "num-partitions": 2} for i in range(2)]
    grid = LocalGrid(cooper_client(LinearTask(2)), partitions, config)
    with pytest.raises(CooperError, match=r"Set num-supernodes = 3 \(now 2\)"):
        CooperStrategy.from_config(config).start(grid)


# -- what comes out --------------------------------------------------------------------


def test_result_metrics_files_and_model_agree(tmp_path: Path) -> None:
    task = LinearTask(2)
    _, _, result = run(tmp_path, task, num_rounds=12, learning_rate=0.3)
    assert result.evaluate_metrics_clientapp[12]["accuracy"] > 0.8
    losses = [result.train_metrics_clientapp[r]["loss"] for r in range(1, 13)]
    assert losses[-1] < losses[0] / 2
    steps = step_losses(result.run_dir)
    assert len(steps) == 36
    assert losses[0] == pytest.approx(sum(steps[:3]) / 3)
    model = load_delivered(result.run_dir, task)
    assert isinstance(model, nn.Sequential)
    assert not model.training
    x, y = task.datasets({})[1].tensors
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert accuracy == pytest.approx(result.evaluate_metrics_clientapp[12]["accuracy"])
    record = tomllib.loads((result.run_dir / "run.toml").read_text())
    assert record["run"]["status"] == "completed"
    assert record["options"]["num-rounds"] == 12
    assert len(result.arrays) == 0  # the relay keeps no model


def test_bytes_per_link_are_what_crosses(tmp_path: Path) -> None:
    _, _, result = run(tmp_path, LinearTask(2), num_rounds=1)
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    (round_,) = [line for line in map(json.loads, lines) if line["kind"] == "round"]
    activations = 96 * 8 * 4  # records, features, bytes; .npy headers come on top
    for link in ("owner -> trainer 1", "trainer 1 -> trainer 2", "trainer 2 -> trainer 1"):
        assert activations < round_["link_bytes"][link] < activations + 3 * 200
    assert 96 * 8 < round_["link_bytes"]["owner -> trainer 2"] < 96 * 8 + 200


def test_nothing_of_a_run_stays_with_the_parties(tmp_path: Path) -> None:
    _, _, result = run(tmp_path, LinearTask(2))
    left = {p.name for p in result.run_dir.rglob("*") if p.is_file()}
    assert left == {
        "attestations.jsonl",
        "log.json",
        "run.toml",
        "metrics.jsonl",
        "privacy.json",
        "model.safetensors",
    }
    assert int(result.run_dir.name) not in {run_id for run_id, _ in CACHE._workers}


def test_state_dir_of_the_node_config_is_used(tmp_path: Path) -> None:
    seen = []

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        seen.extend(p.name for p in (tmp_path / "mine").rglob("node-*"))
        return call_next(message, context)

    config = {"release": "clean", "num-rounds": 1, "run-dir": str(tmp_path / "runs")}
    configs = [{**n, "state-dir": str(tmp_path / "mine")} for n in nodes(2)]
    grid = LocalGrid(cooper_client(LinearTask(2), mods=[mod]), configs, config)
    CooperStrategy.from_config(config).start(grid)
    assert set(seen) == {"node-101", "node-102", "node-103"}


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path) -> None:
    runs = [run_local(LinearTask(2), 2, tmp_path, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (step_losses(r.run_dir) for r in runs if r.run_dir)
    assert first == again != other


def test_without_shuffle_the_order_is_the_data_sets(tmp_path: Path) -> None:
    class Noting(LinearTask):
        seen: list[Tensor] = []

        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            if outputs.requires_grad:
                self.seen.append(labels)
            return outputs.square().mean()

    task = Noting(1)
    run_local(task, 1, tmp_path, shuffle=False)
    labels = task.datasets({})[0].tensors[1]
    assert torch.equal(torch.cat(task.seen[:6]), labels)


def test_more_than_one_chunk_of_release_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_local(LinearTask(2), 2, tmp_path)
    monkeypatch.setattr("flwr_clicooper.chain.owner.CHUNK_BYTES", 7 * 8 * 4)
    wire, _, chunked = run(tmp_path, LinearTask(2), num_rounds=1, batch_size=16)
    assert [a for _, a, _, _ in wire.seen].count("train.release") == 14
    assert whole.run_dir
    # Matrix products of another number of rows may round differently.
    assert step_losses(whole.run_dir) == pytest.approx(step_losses(chunked.run_dir), abs=1e-6)


# -- starting ------------------------------------------------------------------------


def test_num_rounds_of_start_wins(tmp_path: Path) -> None:
    config = {"release": "clean", "num-rounds": 7, "run-dir": str(tmp_path)}
    grid = LocalGrid(cooper_client(LinearTask(1)), nodes(1), config)
    result = CooperStrategy.from_config(config).start(grid, num_rounds=2)
    assert list(result.train_metrics_clientapp) == [1, 2]


def test_initial_arrays_continue_from_a_delivered_model(tmp_path: Path) -> None:
    task = LinearTask(2)
    first = run_local(task, 2, tmp_path, num_rounds=4, learning_rate=0.3)
    assert first.run_dir
    weights = load_delivered(first.run_dir, task).state_dict()
    config = {"release": "interactive", "run-dir": str(tmp_path), "learning-rate": 1e-12}
    grid = LocalGrid(cooper_client(task), nodes(2), config)
    arrays = ArrayRecord(dict(weights))
    second = CooperStrategy.from_config(config).start(grid, arrays, num_rounds=1)
    assert second.run_dir
    for name, value in load_delivered(second.run_dir, task).state_dict().items():
        assert torch.allclose(value, weights[name], atol=1e-7), name


def test_initial_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = {"release": "clean", "run-dir": str(tmp_path)}
    grid = LocalGrid(cooper_client(LinearTask(2)), nodes(2), config)
    arrays = ArrayRecord({"1.0.weight": torch.zeros(3, 3)})
    with pytest.raises(CooperError, match=r"owner .*segment 1: the weights do not fit"):
        CooperStrategy.from_config(config).start(grid, arrays)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rounds": 0}, "'num-rounds' is 0"),
        ({"train_config": ConfigRecord({"lr": 0.1})}, "train_config"),
        ({"evaluate_fn": lambda r, a: MetricRecord()}, "the relay has no model"),
    ],
)
def test_arguments_of_start_that_mean_nothing_are_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"release": "clean", "run-dir": str(tmp_path)}
    grid = LocalGrid(cooper_client(LinearTask(1)), nodes(1), config)
    with pytest.raises(OptionError, match=message):
        CooperStrategy.from_config(config).start(grid, **arguments)


def repeating(action: str, answers: list[Any]) -> type[LocalGrid]:
    """A grid on which messages of one action arrive twice."""

    class Repeating(LocalGrid):
        def _serve(self, message: Message) -> Message:
            reply = super()._serve(message)
            if message.metadata.message_type == action:
                answers.append(super()._serve(message).content["clicooper"])
            return reply

    return Repeating


@pytest.mark.parametrize(
    ("action", "count", "reason"),
    [
        ("train.setup", 3, "the state of this run already"),
        ("train.upload", 2, "is replayed"),
        ("train.forward", 12, "late or doubled|is replayed"),
        ("train.backward", 6, "is replayed"),
    ],
)
def test_a_doubled_message_is_refused_and_changes_nothing(
    action: str, count: int, reason: str, tmp_path: Path
) -> None:
    answers: list[Any] = []
    doubled = run_local(LinearTask(2), 2, tmp_path, repeating(action, answers))
    assert len(answers) == count
    assert all(re.search(reason, a["error"]) for a in answers)
    plain = run_local(LinearTask(2), 2, tmp_path)
    assert doubled.run_dir
    assert plain.run_dir
    assert step_losses(doubled.run_dir) == step_losses(plain.run_dir)


def test_options_of_relay_and_parties_must_agree(tmp_path: Path) -> None:
    config = {"release": "clean", "num-rounds": 1, "run-dir": str(tmp_path)}
    grid = LocalGrid(cooper_client(LinearTask(2)), nodes(2), config | {"microbatches": 4})
    with pytest.raises(CooperError, match=r"owner .*'microbatches' is 1 on the relay and 4"):
        CooperStrategy.from_config(config).start(grid)


def test_one_grid_serves_one_run(tmp_path: Path) -> None:
    config = {"release": "clean", "num-rounds": 1, "run-dir": str(tmp_path)}
    grid = LocalGrid(cooper_client(LinearTask(1)), nodes(1), config)
    first = CooperStrategy.from_config(config).start(grid)
    assert first.run_dir
    before = {p: p.read_bytes() for p in first.run_dir.iterdir()}
    with pytest.raises(OptionError, match="holds a run already"):
        CooperStrategy.from_config(config).start(grid)
    assert {p: p.read_bytes() for p in first.run_dir.iterdir()} == before


def test_a_party_that_cannot_clean_up_does_not_spoil_a_delivered_run(tmp_path: Path) -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type == "train.finish" and context.node_id == FIRST:
            raise OSError("disk gone")
        return call_next(message, context)

    config = {"release": "clean", "num-rounds": 1, "run-dir": str(tmp_path)}
    grid = LocalGrid(cooper_client(LinearTask(2), mods=[mod]), nodes(2), config)
    result = CooperStrategy.from_config(config).start(grid)
    assert result.run_dir
    record = tomllib.loads((result.run_dir / "run.toml").read_text())["run"]
    assert record["status"] == "completed"
    assert (result.run_dir / "model.safetensors").exists()
    CACHE.clear()


def test_run_toml_has_what_is_needed_to_repeat_the_run(tmp_path: Path) -> None:
    config = {"release": "clean", "task.width": 7, "run-dir": str(tmp_path)}
    grid = LocalGrid(cooper_client(LinearTask(1)), nodes(1), config)
    result = CooperStrategy.from_config(config).start(grid, num_rounds=1, timeout=5.0)
    assert result.run_dir
    record = tomllib.loads((result.run_dir / "run.toml").read_text())
    assert record["options"]["num-rounds"] == 1
    assert record["options"]["timeout"] == 5.0
    assert record["options"]["task.width"] == 7
    assert set(record["versions"]) >= {"torch", "flwr", "python", "numpy"}


def test_the_head_never_gets_more_than_a_batch_at_once(tmp_path: Path) -> None:
    sizes = []

    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    class Task(LinearTask):
        def segments(self, config: Any) -> list[nn.Module]:
            return [Head(4, 8), *super().segments(config)[1:]]

    run(tmp_path, Task(2), batch_size=20)
    assert max(sizes) == 20


# -- other tasks ----------------------------------------------------------------------


def test_regression_with_a_loss_of_its_own_reports_no_accuracy(tmp_path: Path) -> None:
    class Regression(LinearTask):
        def datasets(self, config: Any) -> Any:
            x, _ = self.data(96, 0)
            return TensorDataset(x, x[:, :3]), TensorDataset(x, x[:, :3])

        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return (outputs - labels).square().mean()

    result = run_local(Regression(2), 2, tmp_path, num_rounds=3)
    assert set(result.evaluate_metrics_clientapp[3]) == {"loss"}


def test_tuples_and_integers_may_cross_a_cut(tmp_path: Path) -> None:
    class Embed(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x > 0).long(), x

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(2, 3), nn.Linear(4, 3)

        def forward(self, tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.table(tokens).sum(dim=1), self.out(x)

    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    class Task(LinearTask):
        def segments(self, config: Any) -> list[nn.Module]:
            return [Embed(), Mix(), Add()]

    task = Task(2)
    for release in ("clean", "interactive"):
        result = run_local(task, 2, tmp_path, release=release, num_rounds=12)
        assert result.run_dir
        losses = step_losses(result.run_dir)
        assert losses[-1] < losses[0] / 2
        assert load_delivered(result.run_dir, task)(torch.zeros(5, 4)).shape == (5, 3)


def test_a_map_style_data_set_with_several_inputs(tmp_path: Path) -> None:
    class Pairs(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Any:
            x = torch.tensor([float(i % 2), 1.0])
            return (x, -x), i % 2

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(2, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    class Task(SplitTask):
        def segments(self, config: Any) -> list[nn.Module]:
            return [Two(), nn.Linear(4, 2)]

        def datasets(self, config: Any) -> Any:
            return Pairs(), Pairs()

    result = run_local(Task(), 1, tmp_path, num_rounds=20, learning_rate=0.5)
    assert result.evaluate_metrics_clientapp[20]["accuracy"] == 1.0


def test_segmentation_labels_with_the_default_loss(tmp_path: Path) -> None:
    class Dense(SplitTask):
        def segments(self, config: Any) -> list[nn.Module]:
            return [nn.Conv1d(2, 4, 1), nn.Conv1d(4, 3, 1)]

        def datasets(self, config: Any) -> Any:
            x = torch.randn(20, 2, 6)
            y = (x[:, 0] > 0).long()
            return TensorDataset(x, y), TensorDataset(x, y)

    result = run_local(Dense(), 1, tmp_path, num_rounds=20, learning_rate=0.5)
    assert result.evaluate_metrics_clientapp[20]["accuracy"] > 0.9


def test_class_probabilities_as_labels(tmp_path: Path) -> None:
    class Soft(LinearTask):
        def datasets(self, config: Any) -> Any:
            hard = super().datasets(config)
            soft = [(d.tensors[0], nn.functional.one_hot(d.tensors[1]).float()) for d in hard]
            return tuple(TensorDataset(x, y * 0.8 + 0.1) for x, y in soft)

    options: dict[str, Any] = {"num_rounds": 15, "learning_rate": 0.3}
    result = run_local(Soft(2), 2, tmp_path, **options)
    assert result.evaluate_metrics_clientapp[15]["accuracy"] > 0.8


def test_a_segment_may_return_a_list_and_tie_its_own_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> list[Tensor]:
            return [torch.tanh(self.b(torch.tanh(self.a(x))))]

    class Task(LinearTask):
        def segments(self, config: Any) -> list[nn.Module]:
            return [nn.Linear(4, 8), Tied(), nn.Linear(8, 3)]

    task = Task(2)
    plain, forgetful = (
        run_local(task, 2, tmp_path, grid, release="interactive", microbatches=2)
        for grid in (LocalGrid, ForgetfulGrid)
    )
    assert plain.run_dir
    assert forgetful.run_dir
    assert step_losses(plain.run_dir) == pytest.approx(step_losses(forgetful.run_dir))
    model = load_delivered(forgetful.run_dir, task)
    assert model[1].a.weight is model[1].b.weight


def test_buffers_that_are_not_in_the_state_dict_survive_a_new_process(tmp_path: Path) -> None:
    class Task(LinearTask):
        def segments(self, config: Any) -> list[nn.Module]:
            head, middle, last = super().segments(config)
            return [head, nn.Sequential(middle, Counter()), last]

    runs = [run_local(Task(2), 2, tmp_path, grid) for grid in (LocalGrid, ForgetfulGrid)]
    plain, forgetful = (step_losses(r.run_dir) for r in runs if r.run_dir)
    assert plain == pytest.approx(forgetful, abs=1e-6)


@pytest.mark.parametrize("release", ["clean", "interactive"])
def test_numpy_and_python_randomness_in_a_data_set_is_the_runs(
    release: str, tmp_path: Path
) -> None:
    class Augmented(torch.utils.data.Dataset[Any]):
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, i: int) -> Any:
            noise = np.random.randn() + random.random() + torch.randn(()).item()
            return self.x[i] + 0.1 * noise, self.y[i]

    class Task(LinearTask):
        def datasets(self, config: Any) -> Any:
            x, y = self.data(96, 0)
            order = np.random.permutation(96)
            return Augmented(x[order], y[order]), TensorDataset(x, y)

    runs = [
        run_local(Task(2), 2, tmp_path, grid, release=release)
        for grid in (LocalGrid, ForgetfulGrid)
    ]
    plain, forgetful = (step_losses(r.run_dir) for r in runs if r.run_dir)
    assert plain == pytest.approx(forgetful, abs=1e-6)


# -- loading ---------------------------------------------------------------------------


def test_a_model_that_is_missing_damaged_or_anothers_is_refused(tmp_path: Path) -> None:
    task = LinearTask(2)
    result = run_local(task, 2, tmp_path)
    assert result.run_dir
    with pytest.raises(DeliveryError, match="does not exist"):
        load_delivered(tmp_path / "nowhere", task)
    with pytest.raises(DeliveryError, match=r"the weights do not fit: 2\.0\.bias"):
        load_delivered(result.run_dir, LinearTask(3))
    path = result.run_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DeliveryError, match="is damaged"):
        load_delivered(result.run_dir, task)


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DeliveryError, match="of an unnamed format"):
        load_delivered(tmp_path, LinearTask(2))
