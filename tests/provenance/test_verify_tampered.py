"""Statements and lines of a good run changed afterwards, with and without others' help."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flwr_clicooper.provenance.attestation import canonical
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.verify import verify_run
from tests.provenance.runs import Attempt, Made, failed, sha

STRANGER = Identity.new()
LINES = "attestations.jsonl"
NAMES = ("job 1", "start 1.1", "start 1.2", "round 1.1", "round 1.2", "delivery")
"""The lines of a run of two trainers and one round."""


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "7", 2, 1)


def fails(made: Made) -> set[str]:
    return failed(verify_run(made.folder, made.trust))


def rightful(made: Made, name: str) -> list[Identity]:
    """Who signs a line of a run of one round."""
    if name == "job 1":
        return [*made.parties.values()]
    if name == "delivery":
        return [made.parties["owner"]]
    trainer = made.parties[f"trainer {name[-1]}"]
    return [trainer, made.parties["owner"]] if name.startswith("round") else [trainer]


# -- every field of every statement --------------------------------------------------------


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all leaves of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list) and item:
            yield from fields(item, (*path, key))
        else:
            yield (*path, key)


def changed(payload: bytes, path: tuple[Any, ...]) -> bytes:
    """A statement with one field changed to another value of its kind."""
    statement = json.loads(payload)
    parent = statement
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    if isinstance(old, bool):
        new: Any = not old
    elif isinstance(old, int | float):
        new = old + 1
    elif isinstance(old, str):
        new = sha(old) if len(old) in (0, 64) else _other(old)
    else:
        new = [sha("x")] if isinstance(old, list) else {"x": sha("x")}
    parent[path[-1]] = new
    return canonical(statement)


def _other(text: str) -> str:
    return (
        str(STRANGER.public) if text.startswith("ed25519:") else text.replace("1", "2") + "2"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_field_breaks_the_signature(made: Made, name: str) -> None:
    payload, lines = made.lines[made.index(name)].payload, list(made.lines)
    expected = {"job 1": "agreement", "delivery": "delivery"}.get(name, "signatures")
    for path in fields(json.loads(payload)):
        made.lines[:] = lines
        made.replace(name, changed(payload, path))
        made.sign_log()  # the relay helps
        assert fails(made) & {expected, LINES}, path


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_field_that_is_signed_anew_breaks_the_log(made: Made, name: str) -> None:
    payload, lines = made.lines[made.index(name)].payload, list(made.lines)
    for path in fields(json.loads(payload)):
        made.lines[:] = lines
        made.replace(name, changed(payload, path), *rightful(made, name))
        assert fails(made) & {"log", LINES}, path


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_changed_field_that_is_signed_and_logged_anew_breaks_the_chain(
    made: Made, name: str
) -> None:
    payload, lines = made.lines[made.index(name)].payload, list(made.lines)
    links = {"complete", "chain in time", "delivery", LINES}
    for path in fields(json.loads(payload)):
        made.lines[:] = lines
        made.replace(name, changed(payload, path), *rightful(made, name))
        made.sign_log()  # the relay helps
        assert fails(made) & links, path


def test_what_the_owner_and_the_relay_may_change_together(made: Made) -> None:
    """What nobody else can know: its time, versions, figures, and a model that is not here."""
    payload, lines = made.lines[-1].payload, list(made.lines)
    for path in fields(json.loads(payload)):
        made.lines[:] = lines
        made.replace("delivery", changed(payload, path), made.parties["owner"])
        made.sign_log()
        theirs = {"time", "versions", "metrics", "subject"} & set(path)
        assert fails(made) or theirs, path


def test_a_changed_tree_head_is_not_the_relays(made: Made) -> None:
    good = Envelope.from_json((made.folder / "log.json").read_text().strip())
    for path in fields(json.loads(good.payload)):
        bad = replace(good, payload=changed(good.payload, path))
        made.write("log.json", bad.to_json() + "\n")
        assert fails(made) & {"log", "log.json"}, path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"root": sha("x")}, {"log"}),
        ({"size": 5}, {"log"}),
        ({"run": "6"}, {"log"}),
        ({"files": {}}, {"files"}),
        ({"files": {"run.toml": sha("x")}}, {"files"}),
    ],
)
def test_what_the_relay_may_not_sign(made: Made, change: Any, expected: set[str]) -> None:
    made.sign_log(lambda _, it: replace(it, **change))
    assert fails(made) == expected


def test_somebody_else_closes_the_log(made: Made) -> None:
    made.sign_log(who="owner")
    assert fails(made) == {"log"}


# -- signatures ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_signature_stripped_swapped_or_made_by_another_key(made: Made, name: str) -> None:
    place, good = made.index(name), made.lines[made.index(name)]
    checks = {"job 1": {"agreement"}, "delivery": {"delivery"}}.get(
        name, {"signatures", "countersignatures"}
    )
    wrong = []
    for i, it in enumerate(good.signatures):
        others = good.signatures[:i] + good.signatures[i + 1 :]
        flipped = replace(it, sig=bytes([it.sig[0] ^ 1]) + it.sig[1:])
        forged = Envelope.sign(good.payload, STRANGER).signatures[0]
        wrong.append(sorted([*others, flipped], key=lambda it: it.keyid))
        wrong.append(sorted([*others, forged], key=lambda it: it.keyid))
        wrong.append(
            sorted([*others, replace(forged, keyid=it.keyid)], key=lambda it: it.keyid)
        )
        if others:
            wrong.append(list(others))
    if len(good.signatures) > 1:  # each under the other's name
        one, two = good.signatures[:2]
        crossed = [replace(one, sig=two.sig), replace(two, sig=one.sig)]
        wrong.append([*crossed, *good.signatures[2:]])
    for signatures in wrong:
        made.lines[place] = replace(good, signatures=tuple(signatures))
        made.write_lines()
        assert fails(made) & checks
        assert fails(made) <= checks


def test_a_statement_without_signatures_is_not_a_line(made: Made) -> None:
    text = (made.folder / LINES).read_text()
    line = json.loads(text.splitlines()[0])
    bare = json.dumps({**line, "signatures": []}, separators=(",", ":"))
    made.write(LINES, bare + "\n" + text.split("\n", 1)[1])
    assert fails(made) == {LINES}


# -- lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("helped", [False, True], ids=["alone", "with the relay"])
@pytest.mark.parametrize("name", NAMES)
def test_a_line_dropped_doubled_or_moved(made: Made, name: str, helped: bool) -> None:
    place, lines = made.index(name), list(made.lines)
    of_kind = {"job 1": "jobs", "delivery": "delivery"}.get(name, "complete")
    for what, expected in (
        (lines[:place] + lines[place + 1 :], {of_kind}),
        ([*lines[: place + 1], *lines[place:]], {of_kind, "order"}),
        ([*lines[:place], *lines[place + 1 :], lines[place]], {"order", "tree heads"}),
        ([lines[place], *lines[:place], *lines[place + 1 :]], {"order", "tree heads"}),
    ):
        if what == lines:
            continue
        made.lines[:] = what
        made.write_lines()
        if helped:
            made.sign_log()
        found = fails(made)
        assert found >= expected
        assert ("log" in found) != helped


def test_lines_of_several_runs_at_random(tmp_path: Path) -> None:
    attempts = (Attempt(), Attempt("7", 1, ("trainer 2",)))
    made, chance = Made(tmp_path / "7", 2, 2, attempts), random.Random(1)
    pool = [*made.lines, *other_run(made).lines, *made.lines]
    for _ in range(80):
        made.lines[:] = chance.sample(pool, chance.randrange(1, len(pool)))
        made.write_lines()
        made.sign_log()
        assert fails(made)


def test_last_lines_cut_off_by_the_relay(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 2, 3)
    delivery = made.lines[-1]
    for count in range(1, len(made.lines)):
        del made.lines[len(made.lines) - 1 :]
        made.write_lines()
        made.sign_log()
        assert "delivery" in fails(made), count
        made.lines.append(delivery)  # the delivery's digests still name what is gone
        made.write_lines()
        made.sign_log()
        assert {"complete", "delivery"} <= fails(made) or count == 1, count
        made.lines.pop()


def test_a_trainer_dropped_with_the_owners_and_the_relays_help(tmp_path: Path) -> None:
    def without_2(name: str, it: Any) -> Any:
        if name == "delivery":
            left = {"attestations": it.attestations[:1], "watermarks": it.watermarks[:1]}
            return replace(it, **left)
        return None if name.endswith(".2") else it

    made = Made(tmp_path / "7", alter=without_2)
    assert {"complete", "delivery"} <= fails(made)


def test_a_job_without_trainers_is_not_a_job(made: Made) -> None:
    job = json.loads(made.lines[0].payload)
    parties = job["predicate"]["parties"]
    job["predicate"]["parties"] = [parties[0], parties[-1]]
    made.replace("job 1", canonical(job), made.parties["owner"], made.parties["relay"])
    made.sign_log()
    assert fails(made) == {LINES}


def other_run(made: Made) -> Made:
    """The same parties' run under the same ID, at another time."""
    return Made(made.folder.parent / "other", 2, 1, task_option=2.0)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("round 1.1", "round 1.2"),
        ("round 1.1", "start 1.1"),
        ("start 1.2", "start 1.1"),
    ],
)
def test_a_line_in_anothers_place(made: Made, name: str, taken: str) -> None:
    made.lines[made.index(name)] = made.lines[made.index(taken)]
    made.write_lines()
    made.sign_log()
    assert {"complete", "order"} <= fails(made)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_line_of_another_run_of_the_same_parties(made: Made, name: str) -> None:
    other = other_run(made)
    made.lines[made.index(name)] = other.lines[other.index(name)]
    made.write_lines()
    made.sign_log()
    assert fails(made) & {"complete", "delivery"}


def test_a_forged_round_needs_all_that_follow(tmp_path: Path) -> None:
    """The trainer, the owner and the relay together still need the next trainer."""
    made = Made(tmp_path / "7", 2, 2)
    payload = changed(
        made.lines[made.index("round 1.1")].payload, ("subject", 0, "digest", "sha256")
    )
    made.replace("round 1.1", payload, made.parties["trainer 1"])
    made.sign_log()
    assert fails(made) == {"chain in time", "chain of segments", "tree heads"}
