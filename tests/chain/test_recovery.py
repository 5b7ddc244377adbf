"""A trainer is lost, or the run ends early: what goes on equals what was not disturbed."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Context, Message

from flwr_clicooper import CooperStrategy, LocalGrid, cooper_client, load_delivered
from flwr_clicooper.chain.strategy import CooperResult
from flwr_clicooper.errors import (
    ClientError,
    ClientTimeoutError,
    CooperError,
    MessageError,
    OptionError,
    StateError,
)
from tests.tasks import ConvTask, nodes, run_local, verified
from tests.test_exactness import task_for

Notes = list[dict[str, Any]]

OPTIONS: dict[str, Any] = {
    "num-rounds": 4,
    "batch-size": 16,
    "microbatches": 2,
    "link": "mailbox",
}
TRAINER_2 = 103


class Saboteur:
    """A mod that makes one trainer fail in one round, once or from then on."""

    def __init__(
        self,
        round_: int,
        *,
        node_id: int = TRAINER_2,
        action: str = "train.forward",
        times: int = 10**6,
        error: Exception | None = None,
    ) -> None:
        self.round, self.node_id, self.action = round_, node_id, action
        self.times = times
        self.error = error or ConnectionError("the machine is on fire")

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        fields = message.content["clicooper"]
        here = (
            context.node_id,
            message.metadata.message_type,
            fields.get("round", self.round),
        )
        if here == (self.node_id, self.action, self.round) and self.times:
            self.times -= 1
            raise self.error
        return call_next(message, context)


def run(
    task: ConvTask, run_dir: Path, mods: list[Any], standbys: int = 0, **options: Any
) -> CooperResult:
    config = (
        OPTIONS
        | {"run-dir": str(run_dir)}
        | {k.replace("_", "-"): v for k, v in options.items()}
    )
    grid = LocalGrid(cooper_client(task, mods=mods), nodes(2, standbys), config)
    return verified(CooperStrategy.from_config(config).start(grid))


def weights(result: CooperResult, task: ConvTask) -> dict[str, torch.Tensor]:
    assert result.run_dir is not None
    return load_delivered(result.run_dir, task).state_dict()


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(second[name], value, rtol=0, atol=1e-6), name


def undisturbed(task: ConvTask, run_dir: Path, **options: Any) -> dict[str, torch.Tensor]:
    return weights(run(task, run_dir / "undisturbed", [], **options), task)


MODES = [("clean", "trainer"), ("interactive", "trainer"), ("interactive", "owner")]


@pytest.mark.parametrize("round_", [1, 3])
@pytest.mark.parametrize(("release", "label_side"), MODES)
def test_a_standby_takes_over_and_the_result_is_the_same(
    release: str, label_side: str, round_: int, tmp_path: Path
) -> None:
    task = task_for(2, label_side)
    options = {"release": release, "label_side": label_side}
    result = run(task, tmp_path / "a", [Saboteur(round_)], standbys=1, **options)
    equal(weights(result, task), undisturbed(task, tmp_path, **options))
    assert result.run_dir
    text = (result.run_dir / "metrics.jsonl").read_text()
    assert f'"kind": "hand-over", "lost": 103, "standby": 104, "after": {round_ - 1}' in text
    assert {p.name for p in result.run_dir.iterdir()} == {
        "attestations.jsonl",
        "log.json",
        "run.toml",
        "metrics.jsonl",
        "privacy.json",
        "model.safetensors",
    }


@pytest.mark.parametrize(("release", "label_side"), MODES)
def test_without_a_standby_the_run_ends_and_resumes_to_the_same_result(
    release: str, label_side: str, tmp_path: Path
) -> None:
    task = task_for(2, label_side)
    options = {"release": release, "label_side": label_side}
    with pytest.raises(ClientError, match=r"trainer 2 \(node 103\) failed at train\.forward"):
        run(task, tmp_path / "a", [Saboteur(3)], **options)
    (first,) = (tmp_path / "a").iterdir()
    assert tomllib.loads((first / "run.toml").read_text())["run"]["status"] == "failed"
    assert not (first / "model.safetensors").exists()
    assert not list(first.rglob("node-*"))
    result = run(task, tmp_path / "a", [], resume=str(first), **options)
    assert list(result.train_metrics_clientapp) == [3, 4]
    equal(weights(result, task), undisturbed(task, tmp_path, **options))


def notes_of(run_dir: Path, *kinds: str) -> Notes:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] in kinds]


# -- trying again ------------------------------------------------------------------------


@pytest.mark.parametrize("node_id", [101, TRAINER_2], ids=["owner", "trainer"])
def test_who_failed_and_still_answers_is_tried_again(node_id: int, tmp_path: Path) -> None:
    task = ConvTask()
    saboteur = Saboteur(3, node_id=node_id, times=1)
    result = run(task, tmp_path / "a", [saboteur], standbys=1, release="interactive")
    assert result.run_dir
    (note,) = notes_of(result.run_dir, "retry", "hand-over")
    assert (note["kind"], note["node"], note["after"]) == ("retry", node_id, 2)
    equal(weights(result, task), undisturbed(task, tmp_path, release="interactive"))


def test_each_round_may_be_tried_again(tmp_path: Path) -> None:
    mods = [Saboteur(round_, times=1) for round_ in (1, 2, 4)]
    result = run(ConvTask(), tmp_path, mods, release="clean")
    assert result.run_dir
    assert [n["after"] for n in notes_of(result.run_dir, "retry")] == [0, 1, 3]


def test_who_fails_twice_in_a_round_is_replaced(tmp_path: Path) -> None:
    result = run(ConvTask(), tmp_path, [Saboteur(2, times=2)], standbys=1, release="clean")
    assert result.run_dir
    found = notes_of(result.run_dir, "retry", "hand-over")
    assert [note["kind"] for note in found] == ["retry", "hand-over"]


def test_what_was_refused_is_not_tried_again(tmp_path: Path) -> None:
    saboteur = Saboteur(2, times=1, error=MessageError("the loss is NaN"))
    with pytest.raises(ClientError, match="the loss is NaN"):
        run(ConvTask(), tmp_path, [saboteur], standbys=1, release="clean")
    (folder,) = tmp_path.iterdir()
    assert not notes_of(folder, "retry", "hand-over")


def test_lost_state_is_tried_again(tmp_path: Path) -> None:
    saboteur = Saboteur(2, times=1, error=StateError("the state has version 3"))
    result = run(ConvTask(), tmp_path, [saboteur], release="clean")
    assert result.run_dir
    assert len(notes_of(result.run_dir, "retry")) == 1


def test_who_hangs_is_replaced_at_once(tmp_path: Path) -> None:
    def hang(message: Message, context: Context, call_next: Any) -> Message:
        fields = message.content["clicooper"]
        if context.node_id == TRAINER_2 and fields.get("round") == 2:
            time.sleep(1.5)
        return call_next(message, context)

    result = run(ConvTask(), tmp_path, [hang], standbys=1, release="clean", timeout=1.0)
    assert result.run_dir
    found = notes_of(result.run_dir, "retry", "hand-over")
    assert [note["kind"] for note in found] == ["hand-over"]


# -- an owner that leaves after its release ------------------------------------------------


class Leaving(LocalGrid):
    """Node 101, the owner, leaves when training begins; another may join as the owner."""

    joins: ClassVar[tuple[int, ...]] = (104,)
    training = False

    def get_node_ids(self) -> list[int]:
        others = [n for n in self.contexts if n not in (101, 104)]
        return others + (list(self.joins) if self.training else [101])

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            self.training |= message.metadata.message_type == "train.forward"
            if self.training and message.metadata.dst_node_id == 101:
                continue  # Flower does not take a message for a node that left
            ids += super().push_messages([message])
        return ids


def run_leaving(tmp_path: Path, grid_class: type[LocalGrid], **more: Any) -> CooperResult:
    config = OPTIONS | {"run-dir": str(tmp_path), "release": "clean"} | more
    roles = [*nodes(2), {"role": "owner"}]
    grid = grid_class(cooper_client(ConvTask()), roles, config)
    return CooperStrategy.from_config(config).start(grid)


def test_delivery_goes_to_the_owner_that_is_back_as_another_node(tmp_path: Path) -> None:
    task = ConvTask()
    result = run_leaving(tmp_path / "a", Leaving)
    assert result.run_dir
    (note,) = notes_of(result.run_dir, "owner-back")
    assert (note["was"], note["now"]) == (101, 104)
    equal(weights(result, task), undisturbed(task, tmp_path, release="clean"))
    assert not list(result.run_dir.rglob("node-*"))


def test_an_owner_that_does_not_come_back_leaves_a_run_to_resume(tmp_path: Path) -> None:
    class Gone(Leaving):
        joins = ()

    task = ConvTask()
    with pytest.raises(ClientTimeoutError, match=r"no owner came within 1 s .*owner-timeout"):
        run_leaving(tmp_path / "a", Gone, **{"owner-timeout": 1.0})
    (first,) = (tmp_path / "a").iterdir()
    result = run(task, tmp_path / "a", [], release="clean", resume=str(first))
    assert result.train_metrics_clientapp == {}
    equal(weights(result, task), undisturbed(task, tmp_path, release="clean"))


# -- more losses --------------------------------------------------------------------------


def test_two_losses_take_two_standbys_and_a_third_ends_the_run(tmp_path: Path) -> None:
    task = ConvTask()
    mods = [Saboteur(2), Saboteur(3, node_id=104), Saboteur(4, node_id=105)]
    with pytest.raises(ClientError, match=r"trainer 2 \(node 105\)"):
        run(task, tmp_path, mods, standbys=2, release="clean")
    (folder,) = tmp_path.iterdir()
    result = run(task, tmp_path, [], release="clean", resume=str(folder))
    assert list(result.train_metrics_clientapp) == [4]


def test_the_owner_has_no_standby(tmp_path: Path) -> None:
    saboteur = Saboteur(2, node_id=101)
    with pytest.raises(ClientError, match=r"owner \(node 101\) failed"):
        run(ConvTask(), tmp_path, [saboteur], standbys=1, release="interactive")


def test_a_failed_delivery_resumes_without_training_again(tmp_path: Path) -> None:
    task = ConvTask()
    saboteur = Saboteur(0, node_id=101, action="evaluate.delivered")
    with pytest.raises(ClientError, match=r"evaluate\.delivered"):
        run(task, tmp_path / "a", [saboteur], release="interactive")
    (first,) = (tmp_path / "a").iterdir()
    result = run(task, tmp_path / "a", [], release="interactive", resume=str(first))
    assert result.train_metrics_clientapp == {}
    equal(weights(result, task), undisturbed(task, tmp_path, release="interactive"))


# -- what cannot be resumed --------------------------------------------------------------


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    with pytest.raises(ClientError):
        run(ConvTask(), tmp_path / "a", [Saboteur(3)], release="interactive")
    (folder,) = (tmp_path / "a").iterdir()
    return folder


def test_other_options_are_refused(failed: Path, tmp_path: Path) -> None:
    for options in ({"seed": 5}, {"num_rounds": 9}, {"batch_size": 8}):
        with pytest.raises(OptionError, match=r"but the run to resume had"):
            run(ConvTask(), tmp_path, [], release="interactive", resume=str(failed), **options)


@pytest.mark.parametrize("folder", ["nowhere", ""])
def test_a_folder_that_is_no_run_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = tmp_path / (folder or "empty")
    with pytest.raises(OptionError, match="is not a run's folder"):
        run(ConvTask(), tmp_path / "b", [], release="clean", resume=str(path))


def test_a_run_that_closed_no_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClientError):
        run(ConvTask(), tmp_path / "a", [Saboteur(1)], release="clean")
    (folder,) = (tmp_path / "a").iterdir()
    with pytest.raises(OptionError, match="closed no round"):
        run(ConvTask(), tmp_path / "b", [], release="clean", resume=str(folder))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("checkpoints/*/segment-1.pb", r"checkpoint .*segment-1\.pb is missing or damaged"),
        ("owner-checkpoints/*-2-*", r"owner's checkpoint .* is missing or damaged"),
    ],
)
@pytest.mark.parametrize("missing", [True, False])
def test_a_damaged_checkpoint_is_named(
    pattern: str, message: str, missing: bool, failed: Path, tmp_path: Path
) -> None:
    found = list(failed.glob(pattern))
    assert found
    for path in found:
        path.unlink() if missing else path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CooperError, match=message):
        run(ConvTask(), tmp_path / "a", [], release="interactive", resume=str(failed))


def test_a_checkpoint_of_another_model_is_refused(failed: Path, tmp_path: Path) -> None:
    class Other(ConvTask):
        def segments(self, config: Any) -> Any:
            segments = super().segments(config)
            segments[1] = torch.nn.Sequential(segments[1], torch.nn.BatchNorm2d(3))
            return segments

    with pytest.raises(CooperError, match="segment 1: the checkpoint is of another segment"):
        run(Other(), tmp_path / "a", [], release="interactive", resume=str(failed))


def test_a_delivered_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    result = run_local(ConvTask(), 2, tmp_path, release="interactive")
    assert result.run_dir
    assert not list(result.run_dir.rglob("*checkpoint*"))
