"""What leaves the owner under each release mode, and when a release is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flwr_clicooper import CooperStrategy, LocalGrid, cooper_client, load_delivered
from flwr_clicooper.chain.build import build_segments
from flwr_clicooper.errors import ClientError, CooperError, DeliveryError, StateError
from flwr_clicooper.grids.tensors import decode
from flwr_clicooper.options import task_config
from flwr_clicooper.privacy.accounting import epsilon_of, noise_for
from tests.chain.test_recovery import Saboteur
from tests.tasks import LinearTask, nodes

OWNER, RELEASE = 101, "train.release"
LOCAL = {"release": "local-dp", "epsilon": 2.0, "head": "random", "clip": 1.0}
EACH_ROUND = LOCAL | {"release": "interactive"}


class Ears:
    """A mod that keeps every record that the owner sends, and what it is asked."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, dict[str, Tensor]]]] = []
        self.asked: list[tuple[str, set[str]]] = []

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if context.node_id == OWNER:
            action = message.metadata.message_type
            self.asked.append((action, set(message.content.array_records)))
            records = {k: decode(v, k) for k, v in reply.content.array_records.items()}
            self.sent.append((action, {k: clone(v) for k, v in records.items()}))
        return reply

    def released(
        self, name: str = "activations", action: str = "train.release"
    ) -> list[Tensor]:
        return [told[name]["0"] for kind, told in self.sent if kind == action and name in told]


def clone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def run(
    run_dir: Path,
    task: LinearTask | None = None,
    mods: list[Any] | None = None,
    **options: Any,
) -> tuple[Ears, Any]:
    ears = Ears()
    config = {"num-rounds": 2, "batch-size": 32, "run-dir": str(run_dir), "link": "mailbox"}
    config |= {k.replace("_", "-"): v for k, v in options.items()}
    app = cooper_client(task or LinearTask(2), mods=[*(mods or []), ears])
    grid = LocalGrid(app, nodes(2), config)
    result: Any = None
    try:
        result = CooperStrategy.from_config(config).start(grid)
    except CooperError as error:
        result = error
    return ears, result


def head_outputs(task: LinearTask, **options: Any) -> Tensor:
    config = task_config({k.replace("_", "-"): v for k, v in options.items()}, {})
    with torch.no_grad():
        outputs: Tensor = build_segments(task, config)[0](task.data(96, 0)[0])
    return outputs


def clipped(values: Tensor, clip: float) -> Tensor:
    return values * (clip / values.norm(dim=1, keepdim=True)).clamp_max(1.0)


# -- what leaves -----------------------------------------------------------------------


def test_local_dp_sends_clipped_activations_with_the_noise_that_epsilon_needs(
    tmp_path: Path,
) -> None:
    task = LinearTask(2)
    ears, result = run(tmp_path, task, **LOCAL)
    (released,) = ears.released()
    noise = released - clipped(head_outputs(task, **LOCAL), 1.0)
    sigma = noise_for(2.0, 1e-5, 2.0)
    assert sigma == pytest.approx(2 * 1.994, rel=1e-3)
    # 768 numbers: their deviation is within 5 of its own standard errors.
    assert float(noise.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * noise.numel()))
    assert abs(float(noise.mean())) < 5 * sigma / math.sqrt(noise.numel())
    (guarantee,) = result.privacy["activations"]
    assert guarantee == {"unit": "record", "epsilon": pytest.approx(2.0), "delta": 1e-5}


def test_noise_does_not_follow_from_the_seed(tmp_path: Path) -> None:
    (first,), (second,) = (run(tmp_path / n, **LOCAL)[0].released() for n in "ab")
    assert float((first - second).abs().min()) > 0


def test_element_unit_cuts_each_number_and_states_the_records_epsilon(tmp_path: Path) -> None:
    ears, result = run(tmp_path, **LOCAL | {"privacy_unit": "element", "clip": 0.25})
    element, record = result.privacy["activations"]
    assert element == {"unit": "element", "epsilon": pytest.approx(2.0), "delta": 1e-5}
    mu = 0.5 * math.sqrt(8) / noise_for(2.0, 1e-5, 0.5)
    assert record["epsilon"] == pytest.approx(epsilon_of(1e-5, mu))
    assert f"{record['epsilon']:.4g}, 1e-05) per record" in result.privacy["words"]
    assert len(ears.released()) == 1


def test_interactive_dp_releases_anew_each_round_with_noise_for_all(tmp_path: Path) -> None:
    task = LinearTask(2)
    ears, result = run(tmp_path, task, **EACH_ROUND)
    first, second = ears.released()
    exact = clipped(head_outputs(task, **EACH_ROUND), 1.0)
    sigma = noise_for(2.0, 1e-5, 2.0, releases=2)
    for released in (first, second):
        assert float((released - exact).std()) == pytest.approx(sigma, rel=0.13)
    # Independent: their difference has twice the variance.
    assert float((first - second).std()) == pytest.approx(sigma * math.sqrt(2), rel=0.13)
    assert result.privacy["mechanism"]["releases"] == 2


@pytest.mark.parametrize("options", [{"release": "clean"}, LOCAL, EACH_ROUND])
def test_no_gradient_reaches_an_owner_whose_head_does_not_train(
    options: dict[str, Any], tmp_path: Path
) -> None:
    ears, _ = run(tmp_path, **options)
    assert ears.released()
    assert {name for _, asked in ears.asked for name in asked} == {"weights"}
    assert not {"train.forward", "train.backward"} & {action for action, _ in ears.asked}


def test_between_release_and_delivery_the_owner_gets_no_message(tmp_path: Path) -> None:
    ears, _ = run(tmp_path, **LOCAL)
    actions = [action for action, _ in ears.asked]
    assert actions[actions.index("train.release") + 1] == "query.hello"  # at delivery
    assert actions[-4:] == ["train.collect"] * 2 + ["evaluate.delivered", "train.finish"]


# -- the account -----------------------------------------------------------------------


class Greedy:
    """A mod of a relay's accomplice: asks the owner for the same chunk again."""

    def __init__(self) -> None:
        self.replies: list[Tensor] = []

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type == "train.release":
            again = call_next(message, context)
            for one in (reply, again):
                tensors = decode(one.content.array_records["activations"], "activations")
                self.replies.append(tensors["0"].clone())
        return reply


def test_asking_again_gives_the_same_bytes(tmp_path: Path) -> None:
    greedy = Greedy()
    _, result = run(tmp_path, mods=[greedy], **LOCAL)
    first, second = greedy.replies
    assert torch.equal(first, second)
    assert result.privacy["mechanism"]["releases"] == 1


def crash_and_resume(tmp_path: Path, options: dict[str, Any]) -> tuple[Ears, Ears, Any, Path]:
    crash = Saboteur(2)
    ears, error = run(tmp_path / "runs", mods=[crash], **options)
    assert isinstance(error, ClientError)
    (first,) = (tmp_path / "runs").iterdir()
    later, result = run(tmp_path / "runs", resume=str(first), **options)
    return ears, later, result, first


def test_a_resumed_run_sends_what_was_sent_before(tmp_path: Path) -> None:
    ears, later, result, first = crash_and_resume(tmp_path, LOCAL)
    assert torch.equal(ears.released()[0], later.released()[0])
    assert result.privacy["mechanism"]["releases"] == 1
    account = json.loads((first / "owner-release" / "account.json").read_text())
    assert account == {"activations-0": [0]}
    assert not list((first / "owner-release").glob("*.safetensors"))  # delivered


def test_a_replayed_round_costs_nothing_more(tmp_path: Path) -> None:
    ears, later, result, first = crash_and_resume(tmp_path, EACH_ROUND)
    assert torch.equal(ears.released()[-1], later.released()[0])
    assert result.privacy["mechanism"]["releases"] == 2
    account = json.loads((first / "owner-release" / "account.json").read_text())
    assert account == {"activations-0": [1, 2]}


@pytest.mark.parametrize("options", [LOCAL, EACH_ROUND])
def test_a_release_beyond_the_budget_is_refused_and_nothing_leaves(
    options: dict[str, Any], tmp_path: Path
) -> None:
    _, error = run(tmp_path / "runs", mods=[Saboteur(2)], **options)
    (first,) = (tmp_path / "runs").iterdir()
    for path in (first / "owner-release").glob("*.safetensors"):
        path.unlink()
    ears, error = run(tmp_path / "runs", resume=str(first), **options)
    assert isinstance(error, ClientError)
    assert "would exceed the epsilon of the run" in str(error)
    assert not ears.released()


def test_a_resumed_run_without_its_account_is_refused(tmp_path: Path) -> None:
    _, _ = run(tmp_path / "runs", mods=[Saboteur(2)], **LOCAL)
    (first,) = (tmp_path / "runs").iterdir()
    (first / "owner-release" / "account.json").unlink()
    ears, error = run(tmp_path / "runs", resume=str(first), **LOCAL)
    assert "does not say what the run to resume has released" in str(error)
    assert not ears.released()


def test_a_damaged_account_is_refused(tmp_path: Path) -> None:
    _, _ = run(tmp_path / "runs", mods=[Saboteur(2)], **LOCAL)
    (first,) = (tmp_path / "runs").iterdir()
    (first / "owner-release" / "account.json").write_text("[]")
    ears, error = run(tmp_path / "runs", resume=str(first), **LOCAL)
    assert "is not a privacy account" in str(error)
    assert not ears.released()


# -- conditions on the head ------------------------------------------------------------


class Frozen(LinearTask):
    """Its head is always the same."""

    def segments(self, config: Any) -> list[nn.Module]:
        head, *rest = super().segments(config)
        nn.init.constant_(head.weight, 0.5)
        return [head, *rest]


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class StuckBatchNorm(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> StuckBatchNorm:
        return super().train(True)


class HeadWith(LinearTask):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(2)
        self.layer = layer

    def segments(self, config: Any) -> list[nn.Module]:
        head, *rest = super().segments(config)
        return [nn.Sequential(head, self.layer), *rest]


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.int32)


class Back(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        class Float(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.float()

        head, first, last = super().segments(config)
        return [nn.Sequential(head, Whole()), nn.Sequential(Float(), first), last]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Frozen(2), "'weight' is the same for every seed"),
        (HeadWith(Mixing()), "another activation when other records are in its batch"),
        (HeadWith(StuckBatchNorm(8)), "normalises by the batch"),
        (HeadWith(nn.BatchNorm1d(8, track_running_stats=False)), "normalises by the batch"),
        (Back(2), "gives int32[8]; a release with epsilon needs floating-point"),
    ],
)
def test_a_head_that_breaks_the_guarantee_is_refused(
    task: LinearTask, message: str, tmp_path: Path
) -> None:
    ears, error = run(tmp_path, task, **LOCAL)
    assert isinstance(error, ClientError)
    assert error.refused
    assert message in str(error)
    assert not ears.released()


def test_public_statistics_and_a_declared_head_are_taken(
    tmp_path: Path,
) -> None:
    _, result = run(tmp_path / "a", HeadWith(nn.BatchNorm1d(8)), **LOCAL)
    assert result.model
    _, result = run(tmp_path / "b", Frozen(2), **LOCAL | {"head": "public"})
    assert "It rests on the head being public" in result.privacy["words"]


def test_a_random_head_with_given_weights_is_refused(tmp_path: Path) -> None:
    config = {"num-rounds": 1, "batch-size": 32, "run-dir": str(tmp_path), "link": "mailbox"}
    config |= LOCAL
    grid = LocalGrid(cooper_client(LinearTask(2)), nodes(2), config)
    weights = ArrayRecord({"0.weight": torch.ones(8, 4), "0.bias": torch.zeros(8)})  # type: ignore[arg-type]
    with pytest.raises(ClientError, match="not what the run's seed gives"):
        CooperStrategy.from_config(config).start(grid, initial_arrays=weights)


# -- labels ----------------------------------------------------------------------------


class Expanded(LinearTask):
    """A model with as many outputs as the options ask for."""

    def segments(self, config: Any) -> list[nn.Module]:
        *rest, _ = super().segments(config)
        return [*rest, nn.Linear(8, self.classes * max(1, config["label-expansion"]))]


SECRET = {"release": "clean", "label_expansion": 2, "num_rounds": 30, "learning_rate": 0.2}


def test_trainers_get_pseudo_classes_and_the_owner_gets_classes_back(tmp_path: Path) -> None:
    task = Expanded(2)
    ears, result = run(tmp_path, task, **SECRET)
    (told,), true = ears.released("labels"), task.data(96, 0)[1]
    assert set(told.tolist()) == set(range(6))
    for pseudo in range(6):  # each pseudo-class is of one class, in no order
        assert len(set(true[told == pseudo].tolist())) == 1
    model = load_delivered(result.run_dir, task)
    inputs, labels = task.data(64, 1)
    scores = model(inputs)
    assert scores.shape == (64, 3)
    assert torch.allclose(scores.exp().sum(dim=1), torch.ones(64), atol=1e-5)
    accuracy = float((scores.argmax(dim=1) == labels).float().mean())
    assert accuracy == pytest.approx(result.evaluate_metrics_clientapp[30]["accuracy"])
    assert accuracy > 0.8


def test_a_stolen_model_answers_in_pseudo_classes(tmp_path: Path) -> None:
    task = Expanded(2)
    _, result = run(tmp_path, task, **SECRET)
    key = result.run_dir / "label.key"
    assert key.stat().st_mode & 0o077 == 0
    key.rename(tmp_path / "elsewhere.key")
    with pytest.raises(StateError, match=r"label key .* cannot be read"):
        load_delivered(result.run_dir, task)
    model: Any = load_delivered(result.run_dir, task, label_key=tmp_path / "elsewhere.key")
    assert model(task.data(4, 1)[0]).shape == (4, 3)
    model.labels = None
    assert model(task.data(4, 1)[0]).shape == (4, 6)


def test_an_owners_own_key_gives_the_same_classes_in_every_run(tmp_path: Path) -> None:
    from flwr_clicooper.privacy.labels import new_key, save_key

    save_key(tmp_path / "own.key", new_key())
    told = []
    for name in ("a", "b"):
        ears = Ears()
        config = {"release": "clean", "label-expansion": 2, "num-rounds": 1}
        config |= {"link": "mailbox", "run-dir": str(tmp_path / name)}
        places = nodes(2)
        places[0]["label-key"] = str(tmp_path / "own.key")
        grid = LocalGrid(cooper_client(Expanded(2), mods=[ears]), places, config)
        result = CooperStrategy.from_config(config).start(grid)
        assert not (result.run_dir / "label.key").exists()
        told += ears.released("labels")
    assert torch.equal(*told)


def test_a_resumed_run_keeps_its_key_and_its_flipped_labels(tmp_path: Path) -> None:
    options = SECRET | {"label_epsilon": 1.0, "num_rounds": 2}
    config_task = Expanded(2)
    ears, error = run(tmp_path / "runs", config_task, mods=[Saboteur(2)], **options)
    assert isinstance(error, ClientError)
    (first,) = (tmp_path / "runs").iterdir()
    later, result = run(tmp_path / "runs", config_task, resume=str(first), **options)
    assert torch.equal(ears.released("labels")[0], later.released("labels")[0])
    assert load_delivered(result.run_dir, config_task)(torch.zeros(1, 4)).shape == (1, 3)


def test_label_epsilon_flips_at_its_rate(tmp_path: Path) -> None:
    task = LinearTask(2)
    ears, result = run(tmp_path, task, release="clean", label_epsilon=1.0)
    (told,), true = ears.released("labels"), task.data(96, 0)[1]
    keep = math.e / (math.e + 2)
    share = float((told == true).float().mean())
    # Five standard errors: a false alarm in 1.7 million runs.
    assert abs(share - keep) < 5 * math.sqrt(keep * (1 - keep) / 96)
    assert result.privacy["labels"] == [{"unit": "label", "epsilon": 1.0, "delta": 0.0}]


def test_labels_are_flipped_once_for_all_rounds(tmp_path: Path) -> None:
    ears, _ = run(tmp_path, release="interactive", label_epsilon=1.0, shuffle=False)
    told = ears.released("labels", "train.forward")
    assert len(told) == 6
    assert all(torch.equal(a, b) for a, b in zip(told[:3], told[3:], strict=True))


def test_both_guarantees_are_added(tmp_path: Path) -> None:
    _, result = run(tmp_path, **LOCAL | {"label_epsilon": 1.0})
    (both,) = result.privacy["both"]
    assert both == {"unit": "record", "epsilon": pytest.approx(3.0), "delta": 1e-5}


class Regression(LinearTask):
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, labels)

    def data(self, records: int, seed: int) -> tuple[Tensor, Tensor]:
        inputs, _ = super().data(records, seed)
        return inputs, inputs[:, :3]


class Soft(LinearTask):
    def datasets(self, config: Any) -> tuple[TensorDataset, TensorDataset]:
        (x, y), (u, v) = self.data(96, 0), self.data(64, 1)
        return TensorDataset(x, torch.eye(3)[y]), TensorDataset(u, v)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (LinearTask(2), {"label_expansion": 2}, "has 3 outputs; label-expansion = 2 needs"),
        (Regression(2), {"label_expansion": 1}, "for one class index per record"),
        (Regression(2), {"label_epsilon": 1.0}, "for one class index per record"),
        (Soft(2), {"label_epsilon": 1.0}, "labels are probabilities"),
    ],
)
def test_labels_that_cannot_be_mapped_are_refused(
    task: LinearTask, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ears, error = run(tmp_path, task, release="clean", **options)
    assert message in str(error)
    assert not ears.released()


# -- the statement ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said", "unsaid"),
    [
        ({"release": "clean"}, ["no guarantee for activations", "sees the label"], "epsilon"),
        (
            {"release": "interactive"},
            ["from a head that trains", "can be inverted"],
            "epsilon",
        ),
        (LOCAL, ["(2, 1e-05) per record", "once", "sees the label"], "can be inverted"),
        (EACH_ROUND, ["(2, 1e-05) per record", "2 times"], "can be inverted"),
        (LOCAL | {"label_epsilon": 1.0}, ["(1, 0) per label", "(3, 1e-05) per"], "sees the l"),
    ],
)
def test_the_statement_says_what_holds_and_what_does_not(
    options: dict[str, Any], said: list[str], unsaid: str, tmp_path: Path
) -> None:
    _, result = run(tmp_path, **options)
    stored = json.loads((result.run_dir / "privacy.json").read_text())
    assert stored == result.privacy
    for text in said:
        assert text in stored["words"]
    assert unsaid not in stored["words"]
    assert "held-out accuracy" in stored["words"]


def test_the_delivered_model_bounds_its_activations_as_in_training(tmp_path: Path) -> None:
    task = LinearTask(2)
    _, result = run(tmp_path, task, **LOCAL | {"clip": 0.1})
    model = load_delivered(result.run_dir, task)
    inputs = task.data(64, 1)[0]
    # All activations are longer than the bound, so only their direction counts.
    head = model[0]
    with torch.no_grad():
        head.weight *= 3
        head.bias *= 3
        after = model(inputs)
        head.weight /= 3
        head.bias /= 3
        before = model(inputs)
    assert np.allclose(before, after, atol=1e-5)


def test_a_model_of_a_private_run_needs_its_task(tmp_path: Path) -> None:
    _, result = run(tmp_path, **LOCAL)
    with pytest.raises(DeliveryError):
        load_delivered(result.run_dir, LinearTask(3))


# -- synthetic records -----------------------------------------------------------------

CENTRAL = {"release": "central-dp", "epsilon": 4.0, "head": "random"}


class Many(LinearTask):
    """Enough records that their statistics survive the noise."""

    def datasets(self, config: Any) -> tuple[TensorDataset, TensorDataset]:
        return TensorDataset(*self.data(6000, 0)), TensorDataset(*self.data(500, 1))


def test_central_dp_sends_synthetic_rows_that_still_teach(tmp_path: Path) -> None:
    task = Many(2)
    options = CENTRAL | {"batch_size": 256, "num_rounds": 4}
    ears, result = run(tmp_path, task, **options)
    released, labels = torch.cat(ears.released()), torch.cat(ears.released("labels"))
    assert released.shape == (6000, 8)
    assert sorted(set(labels.tolist())) == [0, 1, 2]
    config = task_config({k.replace("_", "-"): v for k, v in options.items()}, {})
    with torch.no_grad():
        own = build_segments(task, config)[0](task.data(6000, 0)[0])
    own = own / own.norm(dim=1, keepdim=True) * math.sqrt(8)
    # No row is a record's: even the nearest of all pairs of 500 is apart.
    assert float(torch.cdist(released[:500].float(), own[:500]).min()) > 1e-4
    assert result.evaluate_metrics_clientapp[4]["accuracy"] > 0.75
    assert result.privacy["activations"] == [{"unit": "record", "epsilon": 4.0, "delta": 1e-5}]
    assert result.privacy["both"] == result.privacy["activations"]
    assert "no record's activation or label itself" in result.privacy["words"]
    model = load_delivered(result.run_dir, task)
    inputs, classes = task.data(500, 1)
    accuracy = float((model(inputs).argmax(dim=1) == classes).float().mean())
    assert accuracy == pytest.approx(result.evaluate_metrics_clientapp[4]["accuracy"])


def test_central_dp_is_released_once_and_sent_again_as_it_was(tmp_path: Path) -> None:
    ears, later, result, first = crash_and_resume(tmp_path, CENTRAL)
    assert torch.equal(ears.released()[0], later.released()[0])
    assert torch.equal(ears.released("labels")[0], later.released("labels")[0])
    account = json.loads((first / "owner-release" / "account.json").read_text())
    assert account == {"synthetic": [0]}
    assert result.model


def test_synthetic_classes_have_secret_names(tmp_path: Path) -> None:
    ears, result = run(tmp_path, Expanded(2), **CENTRAL | {"label_expansion": 2})
    assert set(ears.released("labels")[0].tolist()) <= set(range(6))
    assert load_delivered(result.run_dir, Expanded(2))(torch.zeros(1, 4)).shape == (1, 3)


class Maps(LinearTask):
    def segments(self, config: Any) -> list[nn.Module]:
        head, *rest = super().segments(config)
        spatial = nn.Sequential(head, nn.Unflatten(1, (2, 4)))
        return [spatial, nn.Sequential(nn.Flatten(), rest[0]), *rest[1:]]


def test_central_dp_needs_one_vector_per_record(tmp_path: Path) -> None:
    ears, error = run(tmp_path, Maps(2), **CENTRAL)
    assert "float32[2, 4]; central-dp needs one vector per record" in str(error)
    assert not ears.released()


# -- class scores ----------------------------------------------------------------------


class Scored(Many):
    """Trainers that get three scores of each record."""

    def segments(self, config: Any) -> list[nn.Module]:
        head, *_ = super().segments(config)
        return [head, nn.Linear(3, 8), nn.Linear(8, 3)]


SCORED = LOCAL | {"class_scores": 3, "batch_size": 256, "num_rounds": 4, "epsilon": 4.0}


def test_class_scores_leave_with_the_noise_of_what_fitting_left(tmp_path: Path) -> None:
    task = Scored(2)
    ears, result = run(tmp_path, task, **SCORED)
    released = torch.cat(ears.released())
    assert released.shape == (6000, 3)
    model = load_delivered(result.run_dir, task)
    with torch.no_grad():
        exact = model[0](task.data(6000, 0)[0])
    assert float(exact.norm(dim=1).max()) < 1
    assert torch.allclose(exact.sum(dim=1), torch.zeros(6000), atol=1e-5)
    # Half of mu squared for fitting; two vectors of probabilities are sqrt(2) apart at most.
    sigma = noise_for(4.0, 1e-5, math.sqrt(2), releases=2)
    noise = released - exact
    assert float(noise.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * noise.numel()))
    assert result.evaluate_metrics_clientapp[4]["accuracy"] > 0.75
    inputs, classes = task.data(500, 1)
    accuracy = float((model(inputs).argmax(dim=1) == classes).float().mean())
    assert accuracy == pytest.approx(result.evaluate_metrics_clientapp[4]["accuracy"])
    assert "fitted to Gaussian-noised sums" in result.privacy["words"]


def test_class_scores_are_fitted_once_and_survive_a_resume(tmp_path: Path) -> None:
    options = SCORED | {"num_rounds": 2}
    task = Scored(2)
    ears, error = run(tmp_path / "runs", task, mods=[Saboteur(2)], **options)
    assert isinstance(error, ClientError)
    (first,) = (tmp_path / "runs").iterdir()
    later, result = run(tmp_path / "runs", task, resume=str(first), **options)
    assert torch.equal(ears.released()[0], later.released()[0])
    account = json.loads((first / "owner-release" / "account.json").read_text())
    assert account == {"class-scores": [0], "activations-0": [0]}
    assert load_delivered(result.run_dir, task)(torch.zeros(1, 4)).shape == (1, 3)


def test_class_scores_need_one_vector_per_record(tmp_path: Path) -> None:
    ears, error = run(tmp_path, Maps(2), **LOCAL | {"class_scores": 3})
    assert "float32[2, 4]; class-scores needs one vector per record" in str(error)
    assert not ears.released()
