"""The audit: honest work passes in every mode, and whatever is altered is named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flwr_clicooper import CooperStrategy, LocalGrid, cooper_client
from flwr_clicooper.chain.audit import audit_run
from flwr_clicooper.cli import main
from flwr_clicooper.errors import CooperError, EvidenceError, OptionError
from flwr_clicooper.options import Options
from flwr_clicooper.provenance.audit import Challenge, Point
from flwr_clicooper.provenance.evidence import load_run
from flwr_clicooper.provenance.opening import open_evidence
from flwr_clicooper.provenance.verify import verify_run
from tests.chain.audited import EVERY, WIDTH, WideTask, audit_all, audit_one, wide_run
from tests.chain.test_recovery import Saboteur
from tests.provenance.runs import Made
from tests.tasks import ConvTask, Counter, LinearTask, nodes, run_local
from tests.test_exactness import ForgetfulGrid, task_for

# -- honest runs -----------------------------------------------------------------------


def check(run_dir: Path, task: Any, points: int) -> None:
    report = audit_all(run_dir, task)
    assert not report.failed, report.failed
    assert len(report.outcomes) == points


@pytest.mark.parametrize(
    ("trainers", "grid_class", "options"),
    [
        (1, LocalGrid, {}),
        (2, ForgetfulGrid, {"microbatches": 2}),
        (1, LocalGrid, {"label_side": "owner"}),
        (2, LocalGrid, {"release": "interactive", "microbatches": 2, "pipeline": "gpipe"}),
        (1, ForgetfulGrid, {"release": "interactive", "label_side": "owner"}),
        (1, LocalGrid, {"watermark": False}),
    ],
)
def test_honest_work_with_watermark_passes(
    trainers: int, grid_class: type[LocalGrid], options: dict[str, Any], tmp_path: Path
) -> None:
    task = WideTask(trainers)
    check(wide_run(tmp_path, task, trainers, grid_class, **options), task, trainers * 2 * 3)


@pytest.mark.parametrize(
    ("label_side", "grid_class"), [("trainer", ForgetfulGrid), ("owner", LocalGrid)]
)
def test_honest_convolutions_with_batchnorm_and_dropout_pass(
    label_side: str, grid_class: type[LocalGrid], tmp_path: Path
) -> None:
    task = task_for(2, label_side)
    options: dict[str, Any] = {"audit_every": 2, "num_rounds": 2, "microbatches": 2}
    result = run_local(task, 2, tmp_path, grid_class, label_side=label_side, **options)
    assert result.run_dir
    check(result.run_dir, task, 2 * 2 * 3)


PRIVATE = {"epsilon": 50.0, "head": "random", "release": "interactive"}


@pytest.mark.parametrize("options", [{}, PRIVATE])
def test_honest_work_on_what_came_in_chunks_passes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr_clicooper.chain.owner.CHUNK_BYTES", 7 * WIDTH * 4)
    check(wide_run(tmp_path, WideTask(2), **options), WideTask(2), 2 * 2 * 3)


def test_another_optimizer_passes(tmp_path: Path) -> None:
    class Task(WideTask):
        def optimizer(self, segment: nn.Module, config: Any) -> Any:
            return torch.optim.AdamW(segment.parameters(), lr=0.01)

    check(wide_run(tmp_path, Task(1), 1, ForgetfulGrid), Task(1), 6)


def test_a_segment_with_nothing_to_train_and_a_hidden_buffer_pass(tmp_path: Path) -> None:
    class Task(LinearTask):
        def segments(self, config: Any) -> list[nn.Module]:
            head, _, last = super().segments(config)
            return [head, Counter(), last]

    check(wide_run(tmp_path, Task(2)), Task(2), 12)


def config_for(run_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = {"release": "clean", "num-rounds": 2, "batch-size": 12}
    return config | {"audit-every": EVERY, "link": "mailbox", "run-dir": str(run_dir)}


def test_who_took_over_passes_and_does_not_answer_for_the_one_before(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    grid = LocalGrid(cooper_client(WideTask(2), mods=[Saboteur(2)]), nodes(2, 1), config)
    run_dir = CooperStrategy.from_config(config).start(grid).run_dir
    assert run_dir
    assert verify_run(run_dir).ok
    check(run_dir, WideTask(2), 12)
    shutil.rmtree(run_dir / "evidence-2" / "round-1")
    (run_dir / "evidence-1" / "round-1" / "leaves").unlink()
    taken_over = audit_one(run_dir, WideTask(2), Point(2, 2, 0))
    assert taken_over.passed
    assert "was taken over and not compared" in taken_over.what
    same_trainer = audit_one(run_dir, WideTask(2), Point(1, 2, 0))
    assert "did not open round 1" in same_trainer.what


def test_a_resumed_run_passes_with_the_evidence_of_both(tmp_path: Path) -> None:
    task, config = WideTask(1), config_for(tmp_path)
    mod = Saboteur(2, node_id=102)
    grid = LocalGrid(cooper_client(task, mods=[mod]), nodes(1), config)
    with pytest.raises(CooperError):
        CooperStrategy.from_config(config).start(grid)
    (first,) = tmp_path.iterdir()
    config["resume"] = str(first)
    grid = LocalGrid(cooper_client(task), nodes(1), config)
    second = CooperStrategy.from_config(config).start(grid).run_dir
    assert second
    check(second, task, 6)
    challenge = Challenge.draw(load_run(second), 100)
    for folder in (first, second):
        open_evidence(challenge, folder, tmp_path / "opened")
    assert audit_run(second, task, challenge, tmp_path / "opened").ok


def test_weights_that_are_not_the_seeds_are_mentioned(tmp_path: Path) -> None:
    config, task = config_for(tmp_path), WideTask(1)
    arrays = {"1.0.weight": torch.zeros(WIDTH, WIDTH) + 0.01 * torch.eye(WIDTH)}
    names = task.segments(config | {"label-side": "trainer"})[1].state_dict()
    arrays = {f"1.{k}": v for k, v in names.items()} | arrays
    grid = LocalGrid(cooper_client(task), nodes(1), config)
    strategy = CooperStrategy.from_config(config)
    run_dir = strategy.start(grid, ArrayRecord(arrays), num_rounds=1).run_dir
    assert run_dir
    assert "other weights than the seed gives" in audit_one(run_dir, task, Point(1, 1, 0)).what


def test_the_owners_local_schedule_is_refused() -> None:
    with pytest.raises(OptionError, match="use schedule = 'lockstep', or audit-every = 0"):
        Options(release="clean", schedule="local", audit_every=5)


# -- what is altered -------------------------------------------------------------------

TASK = WideTask(2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_run(tmp_path_factory.mktemp("runs"), TASK, 2, microbatches=2)


@pytest.fixture
def evidence(run_dir: Path, tmp_path: Path) -> Path:
    for folder in run_dir.glob("evidence-*"):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path


def test_evidence_is_for_its_trainers_eyes_only(run_dir: Path) -> None:
    for path in (it for each in run_dir.glob("evidence-*") for it in [each, *each.rglob("*")]):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def changed(path: Path) -> None:
    """Change one value of the first tensor that has several."""
    tensors = load_file(path)
    name = next(k for k, v in tensors.items() if v.numel() > 1 and "rest" not in k)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path)


def renamed(path: Path) -> None:
    save_file({f"{k}0": v for k, v in load_file(path).items()}, path)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"0": [1.0]}))


def huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**31)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


FILES = [
    (Point(1, 1, 3), "round-1/states-3-0", "states at step 3 of round 1"),
    (Point(1, 1, 3), "round-1/states-6-0", "states at step 6 of round 1"),
    (Point(1, 2, 6), "round-2/states-8-0", "states at step 8 of round 2"),
    (Point(1, 2, 0), "round-1/states-8-0", "states at step 8 of round 1"),
    (Point(1, 1, 3), "round-0/activations-in-0-0", "activations-in at chunk 0"),
    (Point(1, 1, 3), "round-1/gradients-in-4-1", "gradients-in at step 4, micro-batch 1"),
    (Point(2, 2, 0), "round-2/activations-in-1-0", "activations-in at step 1, micro-batch 0"),
    (Point(2, 2, 0), "round-0/labels-in-0-0", "labels-in at chunk 0"),
]


@pytest.mark.parametrize("alter", [changed, Path.unlink])
@pytest.mark.parametrize(("point", "file", "what"), FILES)
def test_each_opened_file_that_is_off_is_named(
    point: Point,
    file: str,
    what: str,
    alter: Callable[[Path], None],
    run_dir: Path,
    evidence: Path,
) -> None:
    alter(evidence / f"evidence-{point.segment}" / f"{file}.safetensors")
    outcome = audit_one(run_dir, TASK, point, evidence)
    assert not outcome.passed
    assert what in outcome.what
    if alter is changed:
        assert f"is not what trainer {point.segment} committed to" in outcome.what
        assert "not what was committed to before anybody knew" in outcome.meaning
    else:
        assert f"trainer {point.segment} did not open round" in outcome.what
        assert "Nothing shows that these steps were trained" in outcome.meaning


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (renamed, "is not what trainer 2 committed to"),
        (pickled, "is not a safetensors file"),
        (cut_off, "is not a safetensors file"),
        (huge, "is too large"),
    ],
)
def test_a_hostile_file_is_refused_and_spoils_nothing_else(
    alter: Callable[[Path], None], says: str, run_dir: Path, evidence: Path
) -> None:
    alter(evidence / "evidence-2" / "round-2" / "activations-in-1-0.safetensors")
    assert says in audit_one(run_dir, TASK, Point(2, 2, 0), evidence).what
    assert audit_one(run_dir, TASK, Point(2, 2, 3), evidence).passed


@pytest.mark.parametrize("name", ["leaves", "watermark.key"])
def test_leaves_and_keys_are_those_that_were_signed(
    name: str, run_dir: Path, evidence: Path
) -> None:
    path = evidence / "evidence-2" / "round-1" / name
    words = {"leaves": "do not give the root", "watermark.key": "the one that it committed to"}
    shutil.copy(evidence / "evidence-2" / "round-2" / name, path)
    assert words[name] in audit_one(run_dir, TASK, Point(2, 1, 3), evidence).what
    path.write_text("not hex")
    off = audit_one(run_dir, TASK, Point(2, 1, 3), evidence)
    assert not off.passed
    path.unlink()
    off = audit_one(run_dir, TASK, Point(2, 1, 3), evidence)
    assert "trainer 2 did not open round 1" in off.what
    assert name in off.what


def test_a_challenge_to_another_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    Made(tmp_path / "other", options={"audit-every": EVERY})
    challenge = Challenge.draw(load_run(tmp_path / "other"), 3)
    with pytest.raises(EvidenceError, match="not for this one"):
        audit_run(run_dir, TASK, challenge)


# -- the verifier's side ---------------------------------------------------------------


def test_another_task_does_not_pass(run_dir: Path) -> None:
    class Faster(WideTask):
        def optimizer(self, segment: nn.Module, config: Any) -> Any:
            return torch.optim.SGD(segment.parameters(), lr=0.5, momentum=0.9)

    outcome = audit_one(run_dir, Faster(2), Point(2, 1, 0))
    assert "'lr' is 0.05, not 0.5" in outcome.what
    for task in (WideTask(1), ConvTask(1), LinearTask(2)):
        assert not audit_one(run_dir, task, Point(2, 1, 0)).passed


def test_rounding_of_another_platform_passes_within_a_tolerance_only(run_dir: Path) -> None:
    class Rounding(WideTask):
        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return super().loss(outputs, labels) * (1 + 1e-6)

    exact = audit_one(run_dir, Rounding(2), Point(2, 1, 3))
    assert "the state after step 5 is not what these inputs" in exact.what
    assert "then give a tolerance" in exact.meaning
    near = audit_one(run_dir, Rounding(2), Point(2, 1, 3), tolerance=1e-3)
    assert near.passed
    assert " within " in near.what
    last = audit_one(run_dir, Rounding(2), Point(2, 2, 6), tolerance=1e-3)
    assert "they lead to the signed segment" in last.what


def test_what_is_opened_suffices_alone_and_is_no_more_than_that(
    run_dir: Path, tmp_path: Path
) -> None:
    challenge = Challenge.draw(load_run(run_dir), 2)
    opened, copied = open_evidence(challenge, run_dir, tmp_path / "opened")
    assert opened == list(challenge.points)
    files = [path for path in (tmp_path / "opened").rglob("*") if path.is_file()]
    assert copied == sum(path.stat().st_size for path in files)
    assert audit_run(run_dir, TASK, challenge, tmp_path / "opened").ok
    kinds = {path.name.split("-")[0]: path for path in files}
    assert len(kinds) >= 4
    for path in kinds.values():  # each is needed
        data = path.read_bytes()
        path.unlink()
        report = audit_run(run_dir, TASK, challenge, tmp_path / "opened")
        assert report.failed, path
        path.write_bytes(data)
    with pytest.raises(EvidenceError, match="has nothing of what"):
        open_evidence(challenge, tmp_path, tmp_path / "more")
    with pytest.raises(EvidenceError, match="is the run's own folder"):
        open_evidence(challenge, run_dir, run_dir)


def test_the_command_from_challenge_to_outcome(
    run_dir: Path, evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relay = tmp_path / "relay"
    names = ("attestations.jsonl", "log.json", "run.toml", "metrics.jsonl", "privacy.json")
    relay.mkdir()
    for name in names:
        shutil.copy(run_dir / name, relay)
    challenge, opened = tmp_path / "challenge.json", tmp_path / "opened"
    (tmp_path / "app_of_the_run.py").write_text(
        "from tests.chain.audited import WideTask\ntask = WideTask(2)\n"
    )
    base = ["audit", str(relay), "--app-dir", str(tmp_path), "--challenge", str(challenge)]
    call = [*base, "--task", "app_of_the_run:task", "--steps", "4"]
    assert main(call) == 1
    told = capsys.readouterr().err
    drawn = Challenge.parse(challenge.read_bytes())
    assert len(drawn.points) == 4
    assert all(f"trainer {it.segment}" in told for it in drawn.points)
    assert "clicooper open challenge.json" in told
    assert main(["open", str(challenge), str(evidence), str(opened)]) == 0
    assert "send them to the verifier only" in capsys.readouterr().out
    assert main([*call, "--evidence", str(opened)]) == 0
    assert "give what was signed" in capsys.readouterr().out
    assert Challenge.parse(challenge.read_bytes()) == drawn
    assert main([*call, "--evidence", str(opened), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    it = drawn.points[0]
    shutil.rmtree(opened / f"evidence-{it.segment}")
    assert main([*call, "--evidence", str(opened)]) == 1
    assert f"FAILED: trainer {it.segment}" in capsys.readouterr().out


def test_a_wrong_call_of_the_command_says_what_is_wrong(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def audit(*more: str, folder: Path = run_dir) -> int:
        return main(["audit", str(folder), *more])

    for more in (
        [],
        ["--task", "a:b", "--steps", "0"],
        ["--task", "a:b", "--tolerance", "-1"],
    ):
        with pytest.raises(SystemExit) as stopped:
            audit(*more)
        assert stopped.value.code == 2
    for name in ("tests.tasks", "tests.tasks:nothing", "no.such:thing", "tests.tasks:nodes"):
        assert audit("--task", name) == 1
        assert f"--task {name!r}" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(run_dir, broken)
    lines = (broken / "attestations.jsonl").read_text().splitlines(keepends=True)
    (broken / "attestations.jsonl").write_text("".join(lines[:-1]))
    assert audit("--task", "tests.tasks:LinearTask", folder=broken) == 1
    assert "does not hold" in capsys.readouterr().err
