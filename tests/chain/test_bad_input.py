"""Each way in which a run can be wrong ends with an error that names the culprit."""

from __future__ import annotations

import threading
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message
from flwr.common.constant import ErrorCode
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from flwr_clicooper import CooperError, CooperStrategy, LocalGrid, SplitTask, cooper_client
from flwr_clicooper.chain.serve import CACHE
from flwr_clicooper.grids.tensors import encode_tensor
from tests.tasks import LinearTask, nodes
from tests.test_exactness import ForgetfulGrid

SECRET = 48151623


def start(
    run_dir: Path,
    task: SplitTask | None = None,
    node_configs: list[dict[str, Any]] | None = None,
    mods: Any = None,
    grid_class: type[LocalGrid] = LocalGrid,
    **options: Any,
) -> None:
    config = {"release": "clean", "num-rounds": 1, "batch-size": 32, "run-dir": str(run_dir)}
    config["link"] = "mailbox"
    config |= {k.replace("_", "-"): v for k, v in options.items()}
    app = cooper_client(task or LinearTask(2), mods=mods)
    grid = grid_class(app, nodes(2) if node_configs is None else node_configs, config)
    CooperStrategy.from_config(config).start(grid)


def refused(run_dir: Path, *parts: str, **arguments: Any) -> None:
    """The run fails with all parts in its error, is marked failed, and leaves no model."""
    with pytest.raises(CooperError) as caught:
        start(run_dir, **arguments)
    for part in parts:
        assert part in str(caught.value)
    (run,) = run_dir.iterdir()
    record = tomllib.loads((run / "run.toml").read_text())["run"]
    assert record["status"] == "failed"
    assert record["error"] == str(caught.value)
    assert not list(run.rglob("*.safetensors"))
    assert str(SECRET) not in str(caught.value)


# -- roles ---------------------------------------------------------------------------

OWNER, FIRST, SECOND = nodes(2)


@pytest.mark.parametrize(
    ("node_configs", "parts"),
    [
        (
            [OWNER, FIRST, {"role": "trianer"}],
            ["node 103", "'trianer'", "'owner' or 'trainer'"],
        ),
        ([OWNER, FIRST, {}], ["node 103", "'role' is None", "--node-config"]),
        ([FIRST, SECOND], ["an owner", "is missing"]),
        ([OWNER, OWNER, FIRST, SECOND], ["nodes 101 and 102 are both owner"]),
        ([OWNER, SECOND], ["trainer of stage 1", "is missing", "stages here: 2"]),
        ([OWNER, FIRST], ["trainer of stage 2", "needs 2 trainers", "stages here: 1"]),
        ([OWNER, FIRST, FIRST, SECOND], ["102 and 103", "stage 1", "standby"]),
        ([*nodes(3)], ["node 104", "stage 3", "2 trainers"]),
        (
            [OWNER, FIRST, {"role": "trainer", "stage": 0}],
            ["node 103", "'stage' is 0", ">= 1"],
        ),
        ([OWNER, FIRST, {"role": "trainer", "stage": "2"}], ["'stage' is '2'", "integer"]),
        ([{"role": "owner", "stage": 1}, FIRST, SECOND], ["node 101", "owner"]),
        (
            [{**OWNER, "device": "tpu9"}, FIRST, SECOND],
            ["owner (node 101)", "'tpu9'", "cuda:0"],
        ),
        ([{**OWNER, "state-dir": 7}, FIRST, SECOND], ["owner", "'state-dir' is 7", "path"]),
    ],
)
def test_roles(node_configs: list[dict[str, Any]], parts: list[str], tmp_path: Path) -> None:
    refused(tmp_path, *parts, node_configs=node_configs)


def test_nodes_that_never_join_are_waited_for_and_named(tmp_path: Path) -> None:
    class OpenGrid(LocalGrid):
        complete = False

    started = time.monotonic()
    arguments = {"node_configs": [OWNER, FIRST], "grid_class": OpenGrid, "timeout": 0.5}
    refused(tmp_path, "stage 2", "is missing after", **arguments)
    assert time.monotonic() - started > 0.5


# -- segments ------------------------------------------------------------------------


class Misfit(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        return [nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(5, 3)]


class BatchEater(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        return [nn.Linear(4, 8), nn.Flatten(0), nn.Linear(8, 3)]


class Dictionary(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        class Wrap(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return {"x": x}

        return [nn.Linear(4, 8), Wrap(), nn.Linear(8, 3)]


class Shared(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        layer = nn.Linear(8, 8)
        return [nn.Linear(4, 8), layer, nn.Sequential(layer, nn.Linear(8, 3))]


class NoModule(LinearTask):
    def segments(self, config: Any) -> list[Any]:
        return [nn.Linear(4, 8), "layer", nn.Linear(8, 3)]


class OnlyHead(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        return [nn.Linear(4, 3)]


class TwoOutputs(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        class Twice(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return super().forward(x), super().forward(x)

        return [nn.Linear(4, 8), nn.Linear(8, 8), Twice(8, 3)]


class Spectrum(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        class Transform(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.fft.rfft(x)

        return [nn.Linear(4, 8), Transform(), nn.Linear(5, 3)]


class ExtraState(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        class Extra(nn.Linear):
            def get_extra_state(self) -> Any:
                return {"a": 1}

            def set_extra_state(self, state: Any) -> None:
                pass

        return [nn.Linear(4, 8), Extra(8, 8), nn.Linear(8, 3)]


class Normalised(LinearTask):
    """BatchNorm cannot train on one record: 96 records, batches of 19, leave one."""

    def segments(self, config: Any) -> list[nn.Module]:
        return [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)]


class OtherOnTrainers(LinearTask):
    """A trainer whose code differs from the owner's: a wider second segment."""

    calls = 0

    def segments(self, config: Any) -> list[nn.Module]:
        type(self).calls += 1
        width = 8 if self.calls <= 2 else 7
        return [nn.Linear(4, 8), nn.Linear(8, width), nn.Linear(width, 3)]


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        (
            Misfit(),
            ["segment 1 gives float32[6]", "segment 2", "Linear(in_features=5", "[2, 6]"],
        ),
        (BatchEater(), ["segment 1 turns a batch of 2 records into [16]"]),
        (Dictionary(), ["segment 1", "dict", "tuple of tensors"]),
        (Shared(), ["segment 1", "segment 2", "share a tensor"]),
        (NoModule(), ["segment 1", "str", "not an nn.Module"]),
        (TwoOutputs(), ["float32[3] and float32[3]", "the loss takes one tensor"]),
        (Spectrum(), ["segment 1 returns complex64", "float32"]),
        (ExtraState(), ["segment 1", "'_extra_state'", "not a tensor"]),
        (OnlyHead(), ["gives 1 segments", "at least 2"]),
        (OtherOnTrainers(), ["segment 1 gives float32[7] on trainer 1", "float32[8]"]),
    ],
)
def test_segments(task: SplitTask, parts: list[str], tmp_path: Path) -> None:
    refused(tmp_path, *parts, task=task)


def test_batchnorm_on_a_single_record_is_found_at_setup(tmp_path: Path) -> None:
    parts = ["trainer 1", "train.setup", "cannot train on 1 records", "batch-size 19"]
    refused(tmp_path, *parts, "BatchNorm1d", task=Normalised(2), batch_size=19)


def test_too_few_segments_for_the_u_shape(tmp_path: Path) -> None:
    refused(tmp_path, "2 segments", "at least 3", task=LinearTask(1), label_side="owner")


# -- data ----------------------------------------------------------------------------


def data(x: Tensor, y: Tensor, held_out: tuple[Tensor, Tensor] | None = None) -> SplitTask:
    class Data(LinearTask):
        def datasets(self, config: Any) -> Any:
            return TensorDataset(x, y), TensorDataset(*(held_out or (x, y)))

    return Data(2)


X, Y = torch.randn(64, 4), torch.arange(64) % 3
NO_LENGTH: Any = type("Stream", (Dataset,), {"__getitem__": lambda self, i: (X[i], Y[i])})()


class Moody(LinearTask):
    """Gives other data each time."""

    def datasets(self, config: Any) -> Any:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(time.time_ns() % 2**40))
        return TensorDataset(x, Y), TensorDataset(x, Y)


class NoPairs(LinearTask):
    def datasets(self, config: Any) -> Any:
        return [X[0]] * 8, [X[0]] * 8


class NoLength(LinearTask):
    def datasets(self, config: Any) -> Any:
        return NO_LENGTH, NO_LENGTH


@pytest.mark.parametrize("release", ["clean", "interactive"])
@pytest.mark.parametrize(
    ("task", "parts"),
    [
        (data(X[:0], Y[:0]), ["training set is empty"]),
        (data(X, Y, (X[:0], Y[:0])), ["held-out set is empty"]),
        (data(X, torch.where(Y == 2, SECRET, Y)), ["out of range", "3 outputs", "0 to 2"]),
        (data(X, Y, (X[:, :3], Y)), ["held-out set gives float32[3]", "float32[4]"]),
        (data(X, Y - 1), ["training set is out of range", "0 to 2"]),
        (data(X, Y.float()), ["labels are float32", "integer class index"]),
        (data(X, Y.reshape(32, 2).repeat(2, 1)), ["labels are int64[1, 2]", "integer class"]),
        (data(X, Y, (X, Y + SECRET)), ["held-out set is out of range"]),
        (data(torch.full_like(X, torch.nan), Y), ["NaN or infinite"]),
        (data(X[:, :3], Y), ["the data set gives float32[3]", "segment 0"]),
        (data(X.double(), Y), ["the data set gives float64[4]", "segment 0"]),
        (NoPairs(2), ["not (input, label)"]),
        (NoLength(2), ["training set has no length"]),
    ],
)
def test_data(task: SplitTask, parts: list[str], release: str, tmp_path: Path) -> None:
    refused(tmp_path, "owner (node 101)", *parts, task=task, release=release)


def test_data_that_are_others_in_another_process(tmp_path: Path) -> None:
    parts = ["owner (node 101)", "other data in this process"]
    refused(tmp_path, *parts, task=Moody(2), grid_class=ForgetfulGrid)


# -- what goes wrong in training -----------------------------------------------------


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


class Exploding(nn.Module):
    """Identity whose output or gradient is not finite while it trains."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x / 0.0 if self.where == "output" else BadGradient.apply(x)


def exploding(where: str, stage: int) -> SplitTask:
    class Task(LinearTask):
        def segments(self, config: Any) -> list[nn.Module]:
            found = LinearTask(2).segments(config)
            found[stage] = nn.Sequential(found[stage], Exploding(where))
            return found

    return Task(2)


class BadLoss(LinearTask):
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.sum() * torch.nan


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        (
            exploding("output", 1),
            ["trainer 2", "activations from segment 1", "NaN or infinite"],
        ),
        (
            exploding("output", 2),
            ["trainer 2", "the loss at round 1, step 0", "NaN or infinite"],
        ),
        (
            exploding("gradient", 2),
            ["trainer 1", "gradient from segment 2", "NaN or infinite"],
        ),
        (BadLoss(2), ["trainer 2", "the loss at round 1, step 0, micro-batch 0"]),
    ],
)
def test_values_that_are_not_finite(task: SplitTask, parts: list[str], tmp_path: Path) -> None:
    refused(tmp_path, *parts, task=task)


def test_weights_that_are_not_finite_are_not_delivered(tmp_path: Path) -> None:
    class Late(LinearTask):
        def lr_factor(self, progress: float, config: Any) -> float:
            return 1.0 if progress < 0.6 else float("inf")

    parts = ["owner", "segment 1 of trainer 1", "NaN or infinite in"]
    refused(tmp_path, *parts, task=Late(2))


def raising(place: str) -> SplitTask:
    def fail(*_: Any) -> Any:
        raise ValueError(f"patient {SECRET}")

    return type("Raising", (LinearTask,), {place: fail})(2)


@pytest.mark.parametrize(
    ("place", "who"),
    [
        ("segments", "node 101"),
        ("datasets", "owner (node 101)"),
        ("optimizer", "trainer 1 (node 102)"),
        ("loss", "owner (node 101)"),
        ("correct", "owner (node 101)"),
        ("lr_factor", "trainer 2 (node 103)"),
    ],
)
def test_a_client_that_raises_is_named_but_its_text_stays_with_it(
    place: str, who: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused(tmp_path, who, "ValueError at test_bad_input.py", task=raising(place))
    # The client's own log has it all; in this process both logs are one.
    assert str(SECRET) in caplog.text


def test_an_optimizer_whose_state_cannot_be_stored(tmp_path: Path) -> None:
    class Hoarder(torch.optim.SGD):
        def state_dict(self) -> Any:
            return {"state": {0: {"hoard": object()}}, "param_groups": []}

    class Task(LinearTask):
        def optimizer(self, segment: nn.Module, config: Any) -> Any:
            return Hoarder(segment.parameters(), lr=0.1)

    refused(tmp_path, "trainer 1", "Hoarder", "cannot be stored", task=Task(2))


# -- messages that somebody tampers with ----------------------------------------------

Change = Callable[[ArrayRecord], None]


def tamper(action: str, record: str, change: Change) -> Any:
    """A mod that changes one record of the requests of one action."""

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type == action and record in message.content:
            change(message.content[record])
        return call_next(message, context)

    return mod


def put(tensor: Tensor, name: str = "0") -> Change:
    return lambda record: record.update({name: encode_tensor(tensor)})


def lie_about(field: str, value: Any) -> Change:
    def change(record: ArrayRecord) -> None:
        setattr(record["0"], field, value)

    return change


@pytest.mark.parametrize(
    ("action", "record", "change", "parts"),
    [
        ("train.forward", "activations", put(torch.zeros(32, 7)), ["trainer 2", "float32[8]"]),
        (
            "train.forward",
            "activations",
            put(torch.zeros(31, 8)),
            ["32 records of float32[8]"],
        ),
        ("train.forward", "activations", put(torch.zeros(32, 8).double()), ["float64[32, 8]"]),
        ("train.forward", "activations", put(torch.zeros(32, 8), "1"), ["2 tensors came"]),
        (
            "train.forward",
            "activations",
            put(torch.zeros(32, 8), "a"),
            ["'a' is not the place"],
        ),
        ("train.forward", "activations", lambda r: r.clear(), ["0 tensors came"]),
        ("train.forward", "activations", lie_about("dtype", "float64"), ["'0'"]),
        ("train.forward", "activations", lie_about("shape", (32, 2**40)), ["'0'"]),
        (
            "train.forward",
            "activations",
            lie_about("shape", (-1, 8)),
            ["[-1, 8] is not a shape"],
        ),
        ("train.forward", "activations", lie_about("dtype", "O"), ["dtype 'O'"]),
        ("train.forward", "activations", lie_about("stype", "pickle"), ["'pickle'"]),
        ("train.forward", "activations", lie_about("data", b"junk"), ["the 4 bytes are not"]),
        ("train.backward", "gradients", put(torch.zeros(32, 9)), ["trainer 1", "float32[8]"]),
        (
            "train.backward",
            "gradients",
            put(torch.zeros(32, 8), "4"),
            ["there is no output 4"],
        ),
        ("train.upload", "activations", put(torch.zeros(95, 8)), ["trainer 1", "96 records"]),
        (
            "train.upload",
            "labels",
            put(torch.full((96,), SECRET)),
            ["trainer 2", "out of range"],
        ),
        ("train.upload", "labels", put(torch.zeros(96)), ["trainer 2", "int64[]"]),
        ("train.collect", "weights", put(torch.zeros(8), "0.bias"), ["segment 1", "SHA-256"]),
    ],
)
def test_tampered_messages(
    action: str, record: str, change: Change, parts: list[str], tmp_path: Path
) -> None:
    refused(tmp_path, action, *parts, mods=[tamper(action, record, change)])


def test_tampered_header(tmp_path: Path) -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type == "train.backward":
            message.content["clicooper"]["step"] = 99
        return call_next(message, context)

    refused(tmp_path, "trainer 1", "step 99", mods=[mod])


def test_a_mod_that_raises_is_named(tmp_path: Path) -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type == "train.backward":
            raise CooperError("the mod says no")
        return call_next(message, context)

    refused(tmp_path, "trainer 1 (node 102)", "the mod says no", mods=[mod])


def test_the_text_of_a_mods_exception_stays_with_the_client(tmp_path: Path) -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type == "train.backward":
            raise ValueError(f"patient {SECRET}")
        return call_next(message, context)

    refused(tmp_path, "trainer 1 (node 102)", "ValueError at test_bad_input.py", mods=[mod])


@pytest.mark.parametrize(
    ("action", "who", "what"),
    [
        ("query.hello", "node 101", "no 'clicooper' record"),
        ("train.setup", "owner (node 101)", "no 'clicooper' record"),
        ("train.forward", "trainer 1 (node 102)", "no 'clicooper' record"),
    ],
)
def test_a_reply_without_header_is_named(
    action: str, who: str, what: str, tmp_path: Path
) -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type == action:
            del reply.content["clicooper"]
        return reply

    refused(tmp_path, who, what, mods=[mod])


def test_a_reply_without_a_field_is_named(tmp_path: Path) -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        reply.content["clicooper"].pop("loss", None)
        return reply

    refused(tmp_path, "trainer 2 (node 103)", "'loss' is missing", mods=[mod])


def test_a_mod_that_swallows_a_record_is_named(tmp_path: Path) -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type == "train.forward":
            reply.content.array_records.clear()
            for name in list(reply.content.array_records):
                del reply.content[name]
        return reply

    refused(tmp_path, "trainer 1 (node 102)", "without activations", mods=[mod])


# -- lateness ------------------------------------------------------------------------


def test_a_client_that_answers_late(tmp_path: Path) -> None:
    def slow(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type == "train.backward":
            time.sleep(0.6)
        return call_next(message, context)

    refused(tmp_path, "trainer 1", "did not answer train.backward", mods=[slow], timeout=0.5)


class ThreadedGrid(LocalGrid):
    """Serves each message in a thread, as Flower does: nodes work at the same time."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message_id = self._stamp(message)
            threading.Thread(target=self._work, args=(message_id, message)).start()
            ids.append(message_id)
        return ids

    def _work(self, message_id: str, message: Message) -> None:
        self._replies[message_id] = self._serve(message)


def test_a_late_client_does_not_bring_its_deleted_state_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr_clicooper.chain.phases._GOODBYE", 0.2)
    finished = threading.Event()

    class Slow(LinearTask):
        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            if outputs.requires_grad:
                time.sleep(1.5)
                finished.set()
            return super().loss(outputs, labels)

    class Mailbox(ThreadedGrid):
        warm = False

    parts = ["trainer 2 (node 103)", "did not answer train.forward"]
    refused(tmp_path, *parts, task=Slow(2), grid_class=Mailbox, timeout=0.5)
    assert finished.wait(5)
    time.sleep(0.5)
    assert not list(tmp_path.rglob("node-*"))
    assert not CACHE._workers


def test_each_client_has_the_whole_timeout_for_itself(tmp_path: Path) -> None:
    def slow(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type == "train.close_round":
            time.sleep(0.4)
        return call_next(message, context)

    start(tmp_path, mods=[slow], timeout=0.7)


def test_a_mute_node_that_is_not_needed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr_clicooper.chain.roster._GRACE", 0.2)

    class Mute(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = super().pull_messages(message_ids)
            return [r for r in replies if r.metadata.src_node_id != 104]

    started = time.monotonic()
    start(tmp_path, node_configs=nodes(2, 1), grid_class=Mute, timeout=20)
    assert time.monotonic() - started < 10


def test_a_node_that_has_left_is_not_counted(tmp_path: Path) -> None:
    class Leaving(LocalGrid):
        def _serve(self, message: Message) -> Message:
            if message.metadata.dst_node_id != 104:
                return super()._serve(message)
            error = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat")
            return Message(error, reply_to=message)

    start(tmp_path, node_configs=[*nodes(2), SECOND], grid_class=Leaving)


def test_an_error_of_flower_itself_is_given_to_the_node_that_was_asked(tmp_path: Path) -> None:
    class Expiring(LocalGrid):
        """As Flower's grids, answers for a node with an error from the SuperLink."""

        def _serve(self, message: Message) -> Message:
            if message.metadata.message_type != "train.forward":
                return super()._serve(message)
            reply = Message(Error(code=201, reason="expired"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1
            return reply

    refused(tmp_path, "trainer 1 (node 102)", "expired", grid_class=Expiring)


class LossyGrid(LocalGrid):
    """Loses every reply to ``train.forward``."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        return [r for r in replies if r.metadata.message_type != "train.forward"]


class GoneGrid(LocalGrid):
    """Does not take messages for a node that has left, as Flower's grid."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        found = list(messages)
        if found[0].metadata.message_type == "train.forward":
            return []
        return list(super().push_messages(found))


@pytest.mark.parametrize(
    ("grid_class", "parts"),
    [
        (LossyGrid, ["trainer 1 (node 102)", "train.forward", "0.3 s"]),
        (GoneGrid, ["trainer 1 (node 102) cannot be reached"]),
    ],
)
def test_a_client_that_never_answers(
    grid_class: type[LocalGrid], parts: list[str], tmp_path: Path
) -> None:
    refused(tmp_path, *parts, grid_class=grid_class, timeout=0.3)
