"""Runs with signed rounds: what each party refuses to sign, and what the evidence shows."""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file

from flwr_clicooper import CooperStrategy, LocalGrid, cooper_client
from flwr_clicooper.chain import attestor
from flwr_clicooper.chain.delivered import MODEL_FILE
from flwr_clicooper.chain.marking import Marking
from flwr_clicooper.chain.notary import Notary
from flwr_clicooper.chain.relay import Relay
from flwr_clicooper.chain.strategy import CooperResult
from flwr_clicooper.errors import ClientError, CooperError, OptionError, TrustError
from flwr_clicooper.provenance.attestation import LogHead, RoundStatement, canonical
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.evidence import OwnKeys, load_run
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.trust import Party, Trust
from flwr_clicooper.provenance.verify import verify_run
from flwr_clicooper.provenance.watermark import ACCEPT, Watermark
from tests.chain.audited import WideTask
from tests.chain.test_recovery import Saboteur
from tests.tasks import LinearTask, nodes, run_local, verified
from tests.test_exactness import ForgetfulGrid

OPTIONS: dict[str, Any] = {"release": "clean", "num-rounds": 2, "link": "mailbox"}


def run(
    run_dir: Path,
    *mods: Any,
    task: LinearTask | None = None,
    configs: list[dict[str, Any]] | None = None,
    **options: Any,
) -> CooperResult:
    config = OPTIONS | {"run-dir": str(run_dir)}
    config |= {k.replace("_", "-"): v for k, v in options.items()}
    app = cooper_client(task or LinearTask(2), mods=list(mods))
    grid = LocalGrid(app, configs or nodes(2), config)
    return verified(CooperStrategy.from_config(config).start(grid))


# -- what a relay cannot make parties sign -------------------------------------------------


Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def lying_relay(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Change], None]:
    """Let the relay change the fields of all its messages of one kind."""

    def install(action: str, change: Change) -> None:
        send = Relay.send

        def lie(
            self: Relay, node_id: int, kind: Any, fields: Any, *rest: Any, **more: Any
        ) -> str:
            fields = dict(fields)
            if kind == action:
                change(fields)
            return send(self, node_id, kind, fields, *rest, **more)

        monkeypatch.setattr(Relay, "send", lie)

    return install


def in_job(**values: Any) -> Change:
    def change(fields: dict[str, Any]) -> None:
        payload = json.loads(fields["job"])
        payload["predicate"] |= values
        fields["job"] = canonical(payload).decode()

    return change


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"run": "1"}, "'run'"),
        ({"rounds": 7}, "'rounds'"),
        ({"records": 7}, "'records'"),
        ({"options": {"release": "interactive"}}, "'options'"),
        ({"task": {"task.lr": 9.0}}, "'task'"),
        ({"nonce": "0" * 64}, "'nonce'"),
        ({"cuts": [["float32[1]"]]}, "'cuts'"),
        ({"initial": ["0" * 64, "1" * 64]}, "begins with other weights"),
    ],
)
def test_a_job_that_is_not_the_partys_is_not_signed(
    lying_relay: Any, tmp_path: Path, values: dict[str, Any], what: str
) -> None:
    lying_relay("train.agree", in_job(**values))
    with pytest.raises(ClientError, match=what):
        run(tmp_path)


def test_a_privacy_statement_that_is_not_the_owners_is_not_signed(
    lying_relay: Any, tmp_path: Path
) -> None:
    def change(fields: dict[str, Any]) -> None:
        payload = json.loads(fields["job"])
        payload["subject"][0]["digest"]["sha256"] = "0" * 64
        fields["job"] = canonical(payload).decode()

    lying_relay("train.agree", change)
    with pytest.raises(ClientError, match="'subject'"):
        run(tmp_path)


def test_a_trainer_does_not_begin_with_weights_that_the_owner_has_not(tmp_path: Path) -> None:
    class Own(LinearTask):
        """Gives one trainer other weights, as a trainer would that trained before."""

        def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
            self.ours = context.node_config.get("stage") == 2
            return call_next(message, context)

        def segments(self, config: Any) -> Any:
            made = super().segments(config)
            if getattr(self, "ours", False):
                with torch.no_grad():
                    made[2].weight.add_(1.0)
            return made

    task = Own(2)
    with pytest.raises(ClientError, match="segment 2 does not begin with the weights"):
        run(tmp_path, task, task=task)


def test_another_predecessor_is_refused(lying_relay: Any, tmp_path: Path) -> None:
    first: list[str] = []

    def change(fields: dict[str, Any]) -> None:
        if fields["predecessor"]:
            first.append(fields["predecessor"])
            fields["predecessor"] = first[0]  # the one of round 1, in round 2, too

    lying_relay("train.attest", change)
    with pytest.raises(ClientError, match="not the one on segment 1 after round 2"):
        run(tmp_path)


def test_a_predecessors_statement_that_it_did_not_sign_is_refused(
    lying_relay: Any, tmp_path: Path
) -> None:
    def change(fields: dict[str, Any]) -> None:
        if fields["predecessor"]:
            given = Envelope.from_json(fields["predecessor"])
            statement = replace(RoundStatement.parse(given.payload), seconds=99.0)
            signed = Envelope.sign(statement.payload(), Identity.new())
            fields["predecessor"] = signed.to_json()

    lying_relay("train.attest", change)
    with pytest.raises(ClientError, match="lacks the signature by the key"):
        run(tmp_path)


class Late:
    """Computes digests as late as possible: when they are asked for."""

    def __init__(self) -> None:
        self.waiting: Counter[int] = Counter()
        self.most = 0

    def submit(self, function: Callable[..., bytes], *args: Any) -> Any:
        party = id(function.__self__)  # type: ignore[attr-defined]
        self.waiting[party] += 1
        self.most = max(self.most, self.waiting[party])

        def result() -> bytes:
            self.waiting[party] -= 1
            return function(*args)

        return SimpleNamespace(result=result)


@pytest.mark.parametrize("late", [False, True])
def test_tensors_that_were_changed_on_their_way_are_not_signed(
    late: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if late:
        monkeypatch.setattr(attestor, "_POOL", Late())

    def brighten(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        here = (context.node_id, message.metadata.message_type)
        if here == (103, "train.forward") and "gradients" in reply.content:
            record = reply.content.array_records["gradients"]
            array = record["0"].numpy().copy()
            record["0"] = type(record["0"]).from_numpy_ndarray(array * 2)
        return reply

    with pytest.raises(ClientError, match="trainer 1 signed other gradients-in than"):
        run(tmp_path, brighten)


def test_a_party_leaves_few_tensors_to_be_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    late = Late()
    monkeypatch.setattr(attestor, "_POOL", late)
    run(tmp_path, link="live", batch_size=4)
    assert 4 < late.most <= attestor._AHEAD + 1
    assert not +late.waiting


def test_a_log_that_did_not_grow_out_of_the_last_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = Notary._signed_head

    def fork(self: Notary, files: Any) -> Envelope:
        head = LogHead.parse(shown(self, files).payload)
        if head.size > 3:
            head = replace(head, root="ab" * 32)
        return Envelope.sign(head.payload(), self.identity)

    monkeypatch.setattr(Notary, "_signed_head", fork)
    with pytest.raises(ClientError, match="the log of 5 lines does not continue that of 3"):
        run(tmp_path)


def test_a_log_that_is_not_signed_is_refused(lying_relay: Any, tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        head = Envelope.from_json(fields["head"])
        fields["head"] = Envelope.sign(head.payload, Identity.new()).to_json()

    lying_relay("train.attest", change)
    with pytest.raises(ClientError, match="lacks the signature by the key"):
        run(tmp_path)


def test_a_log_that_is_hidden_again_is_refused(lying_relay: Any, tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        if fields["round"] == 2:
            fields["head"] = ""

    lying_relay("train.attest", change)
    with pytest.raises(ClientError, match="showed no tree head"):
        run(tmp_path)


def test_a_round_is_signed_once(lying_relay: Any, tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["round"] = 1

    lying_relay("train.attest", change)
    with pytest.raises(ClientError, match="round 1 was signed last; 1 is not next"):
        run(tmp_path)


# -- whose keys ----------------------------------------------------------------------------


def with_keys(folder: Path, *, relay: bool = True) -> tuple[list[dict[str, Any]], str]:
    """Return node configs with identities and a trust file of all, and the relay's key."""
    configs, trust = nodes(2), folder / "trust.toml"
    for number, config in enumerate(configs):
        Identity.new().save(folder / f"{number}.pem")
        public = Identity.load(folder / f"{number}.pem").public
        Trust.add(trust, Party(f"p{number}", config["role"], public, config.get("stage", 0)))
        config |= {"identity-key": str(folder / f"{number}.pem"), "trust-file": str(trust)}
    Identity.new().save(folder / "relay.pem")
    if relay:
        public = Identity.load(folder / "relay.pem").public
        Trust.add(trust, Party("relay", "relay", public))
    return configs, str(folder / "relay.pem")


def test_a_run_with_a_trust_file_verifies_against_it(tmp_path: Path) -> None:
    configs, relay = with_keys(tmp_path)
    result = run(tmp_path / "runs", configs=configs, relay_key=relay)
    assert result.run_dir is not None
    trust = Trust.load(tmp_path / "trust.toml")
    report = verify_run(result.run_dir, trust)
    assert report.ok
    assert {c.outcome for c in report.checks if c.name == "trusted keys"} == {"passed"}
    with pytest.raises(TrustError):
        trust.expect("owner", 0, Identity.new().public)


def test_a_relay_that_the_trust_file_does_not_list_is_refused(tmp_path: Path) -> None:
    configs, _ = with_keys(tmp_path)
    with pytest.raises(ClientError, match="not trusted as relay"):
        run(tmp_path / "runs", configs=configs)


def test_without_sealing_too_keys_must_be_those_of_the_trust_file(tmp_path: Path) -> None:
    configs, relay = with_keys(tmp_path)
    Identity.new().save(tmp_path / "stranger.pem")
    configs[2]["identity-key"] = str(tmp_path / "stranger.pem")
    with pytest.raises(ClientError, match="not trusted as trainer 2"):
        run(tmp_path / "runs", configs=configs, relay_key=relay, seal=False)


# -- watermarks in training ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "more"),
    [
        (ForgetfulGrid, {"microbatches": 2}),
        (LocalGrid, {"schedule": "local"}),
        (LocalGrid, {"release": "interactive"}),
        (LocalGrid, {"label_side": "owner"}),
    ],
)
def test_every_round_is_marked_and_all_marks_are_in_the_delivered_model(
    tmp_path: Path, grid: type[LocalGrid], more: dict[str, Any]
) -> None:
    result = run_local(WideTask(2), 2, tmp_path, grid, num_rounds=4, batch_size=24, **more)
    assert result.run_dir is not None
    evidence = load_run(result.run_dir)
    marks = [line.statement.watermark for line in evidence.rounds]
    assert {(m.bits, m.matches) for m in marks if m.bits} == {(256, 256)}
    assert sum(m.bits > 0 for m in marks) == 2 * 4
    model = load_file(result.run_dir / MODEL_FILE)
    for segment in (1, 2):
        path = result.run_dir / f"watermark-{segment}.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        keys = OwnKeys.parse(path.read_bytes()).keys
        assert list(keys) == ["1", "2", "3", "4"]
        prefix = f"{segment}."
        own = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
        found = [Watermark(bytes.fromhex(k), own).matches(own) for k in keys.values()]
        assert found[-1] == 256
        assert min(found) >= ACCEPT
    assert stat.S_IMODE((result.run_dir / "watermark.json").stat().st_mode) == 0o600


def test_without_watermark_nothing_is_marked_and_training_is_exact(tmp_path: Path) -> None:
    task = WideTask(2)
    plain = run_local(task, 2, tmp_path / "a", num_rounds=2, attest=False, watermark=False)
    signed = run_local(task, 2, tmp_path / "b", num_rounds=2, watermark=False)
    assert plain.run_dir is not None
    assert signed.run_dir is not None
    files = {p.name for p in plain.run_dir.iterdir()}
    assert not files & {"attestations.jsonl", "log.json", "watermark.json"}
    assert not (signed.run_dir / "watermark.json").exists()
    one, two = (load_file(r.run_dir / MODEL_FILE) for r in (plain, signed) if r.run_dir)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_trainer_cannot_say_that_its_segment_is_too_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def skip(self: Marking, module: Any, *, wanted: bool) -> None:
        self._module, self._key, self._mark = module, "", None
        self.skipped = "too small, sorry"

    monkeypatch.setattr(Marking, "__init__", skip)
    with pytest.raises(ClientError, match="it must have one"):
        run_local(WideTask(2), 2, tmp_path)


def test_a_hand_over_is_in_the_evidence_and_the_standby_marks_with_its_own_keys(
    tmp_path: Path,
) -> None:
    options = OPTIONS | {"num-rounds": 3, "run-dir": str(tmp_path)}
    app = cooper_client(WideTask(2), mods=[Saboteur(2)])
    grid = LocalGrid(app, nodes(2, 1), options)
    result = verified(CooperStrategy.from_config(options).start(grid))
    assert result.run_dir is not None
    evidence = load_run(result.run_dir)
    first, retry, last = (line.statement for line in evidence.jobs)
    assert [(job.attempt, job.after) for job in (first, retry, last)] == [
        (1, 0),
        (2, 1),
        (3, 1),
    ]
    assert first.party("trainer", 2) != last.party("trainer", 2)
    assert first.initial == last.initial
    kinds = [(line.statement.kind, line.statement.round) for line in evidence.segments[2]]
    begun = [("start", 0), ("round", 1), ("start", 1), ("start", 1)]
    assert kinds == [*begun, ("round", 2), ("round", 3)]


# -- the ends ------------------------------------------------------------------------------


def test_a_run_that_failed_can_be_verified_up_to_its_last_round(tmp_path: Path) -> None:
    with pytest.raises(CooperError):
        run(tmp_path, Saboteur(2))
    (folder,) = tmp_path.iterdir()
    failed = verify_run(folder).failed
    assert {check.name for check in failed} == {"delivery"}
    assert "after round 1 of 2" in failed[0].what


def test_a_resumed_run_must_have_the_same_task_options(tmp_path: Path) -> None:
    with pytest.raises(CooperError):
        run(tmp_path, Saboteur(2), **{"task.lr": 0.5})
    (folder,) = tmp_path.iterdir()
    with pytest.raises(OptionError, match=r"'task\.lr' is 0\.25, but the run to"):
        run(tmp_path, resume=str(folder), **{"task.lr": 0.25})
    with pytest.raises(OptionError, match=r"'task\.lr' is missing"):
        run(tmp_path, resume=str(folder))


def test_a_figure_that_is_no_number_is_left_out_of_the_delivery(tmp_path: Path) -> None:
    class Odd(LinearTask):
        def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            value = super().loss(outputs, labels)
            return value if outputs.requires_grad else value * math.inf

    result = run(tmp_path, task=Odd(2))
    assert result.run_dir is not None
    (delivery,) = load_run(result.run_dir).deliveries
    assert not delivery.statement.metrics


def test_the_relays_result_says_how_much_was_signed(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.run_dir is not None
    lines = (result.run_dir / "attestations.jsonl").read_text().splitlines()
    assert result.provenance["statements"] == len(lines) == 1 + 2 + 2 * 2 + 1
    head = load_run(result.run_dir).head
    assert head is not None
    assert result.provenance["root"] == head.statement.root


# -- what a relay or a trainer could gain by the order of messages ----------------------------


def identified(folder: Path) -> list[dict[str, Any]]:
    """Return node configs whose nodes keep their identities over attempts."""
    configs = nodes(2)
    for number, config in enumerate(configs):
        Identity.new().save(folder / f"{number}.pem")
        config["identity-key"] = str(folder / f"{number}.pem")
    return configs


def test_a_failure_at_delivery_does_not_lose_the_last_watermarks(tmp_path: Path) -> None:
    result = run(
        tmp_path / "runs",
        Once("query.deliver"),
        task=WideTask(2),
        configs=identified(tmp_path),
    )
    assert result.run_dir is not None
    evidence = load_run(result.run_dir)
    assert [line.statement.after for line in evidence.jobs] == [0, 2]
    (delivery,) = evidence.deliveries
    found = [
        (mark.segment, mark.round, mark.matches) for mark in delivery.statement.watermarks
    ]
    assert found == [(1, 2, 256), (2, 2, 256)]
    outcomes = {c.name: c.outcome for c in verify_run(result.run_dir).checks}
    assert outcomes["watermarks"] == outcomes["watermarks in the model"] == "passed"


class Once:
    """A mod that lets one trainer fail once at an action."""

    def __init__(self, action: str) -> None:
        self.action = action

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        if (context.node_id, message.metadata.message_type) == (103, self.action):
            self.action = ""
            raise ConnectionError("the machine is on fire")
        return call_next(message, context)


def test_a_trainer_cannot_shed_its_watermark_by_failing_at_delivery(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def shed(self: Marking) -> None:
        with torch.no_grad():
            for parameter in self._module.parameters():
                parameter.neg_()

    monkeypatch.setattr(Marking, "complete", shed)
    monkeypatch.setattr(Marking, "found", lambda self: (256, 256))
    with pytest.raises(ClientError, match="does not carry trainer 1's watermark"):
        run(
            tmp_path / "runs",
            Once("query.deliver"),
            task=WideTask(2),
            configs=identified(tmp_path),
        )


def test_a_chunk_cannot_be_replaced_after_it_was_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    send, kept = Relay.send, []

    def lie(
        self: Relay, to: int, kind: Any, fields: Any, records: Any = None, **more: Any
    ) -> str:
        if kind == "train.upload" and "activations" in records:
            record = records["activations"]
            kept.append((to, dict(fields), records))
            array = type(record["0"]).from_numpy_ndarray(record["0"].numpy() * 2)
            records = {"activations": type(record)({"0": array})}
        if kind == "train.close_round" and to == 102:  # trained: now the true ones
            for node, header, true in kept:
                send(self, node, "train.upload", header, true, persist=True)
                self.receive()
        return send(self, to, kind, fields, records, **more)

    monkeypatch.setattr(Relay, "send", lie)
    with pytest.raises(ClientError, match="chunk 0 of activations-in came again as another"):
        run(tmp_path, seal=False)


def test_a_message_of_another_segment_or_round_is_measured_where_it_is_trained_on(
    lying_relay: Any, tmp_path: Path
) -> None:
    def elsewhere(fields: dict[str, Any]) -> None:
        fields["segment"] = 99

    lying_relay("train.backward", elsewhere)
    assert verify_run(run(tmp_path / "a", seal=False).run_dir or tmp_path).ok

    def later(fields: dict[str, Any]) -> None:
        fields["release"] = 7

    lying_relay("train.upload", later)
    with pytest.raises(ClientError, match="a message is of round 7, not of 1"):
        run(tmp_path / "b", seal=False)


def test_statements_of_other_rounds_at_delivery_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def more(self: Notary, stage: int) -> dict[str, list[str]]:
        places = self._of_segment[stage]
        return {"statements": [self.lines[place].to_json() for place in places]}

    monkeypatch.setattr(Notary, "for_collection", more)
    with pytest.raises(ClientError, match="are not its last ones"):
        run(tmp_path)


def test_no_key_is_disclosed_before_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    close = Notary.close_round

    def curious(self: Notary, relay: Relay, trainers: Any, round_: int) -> None:
        close(self, relay, trainers, round_)
        relay.ask(trainers[0], "query.deliver", {})

    monkeypatch.setattr(Notary, "close_round", curious)
    with pytest.raises(ClientError, match="disclosed, at the end only"):
        run(tmp_path, task=WideTask(2), seal=False)
