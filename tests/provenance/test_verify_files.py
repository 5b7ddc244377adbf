"""Files of a good run changed afterwards; in the end, any byte of any of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.evidence import DisclosedKeys, load_run
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.trust import Trust
from flwr_clicooper.provenance.verify import RULES, verify_run
from tests.provenance.runs import Attempt, Made, failed, sha

STRANGER = Identity.new()
LINES = "attestations.jsonl"


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "7", 2, 1)


def fails(made: Made) -> set[str]:
    return failed(verify_run(made.folder, made.trust))


@pytest.mark.parametrize("name", ["run.toml", "metrics.jsonl", "privacy.json"])
def test_a_covered_file_changed_or_gone(made: Made, name: str) -> None:
    path = made.folder / name
    good = path.read_bytes()
    path.write_bytes(good + b"\n")
    assert fails(made) == {"files"}
    path.unlink()
    assert "files" in fails(made)


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("run.toml", 'id = "7"', 'id = "8"', {"options"}),
        ("run.toml", "epsilon = 0.0", "epsilon = 1.0", {"options"}),
        ("run.toml", "watermark = true", "watermark = 1", {"options"}),
        ("run.toml", "num-rounds = 1", "num-rounds = 2", {"options"}),
        ("run.toml", '"task.lr" = 0.1', '"task.lr" = 0.2', {"options"}),
        ("run.toml", "[run]", "[run", {"options"}),
        ("run.toml", "[options]", "[settings]", {"options"}),
        ("privacy.json", "2.5", "0.5", {"privacy as agreed", "privacy as delivered"}),
        ("privacy.json", "{", "", {"privacy as agreed", "privacy as delivered"}),
        ("privacy.json", "2.5", "1e999", {"privacy as agreed", "privacy as delivered"}),
        # People would read the first, programs the second.
        (
            "privacy.json",
            "{",
            '{"words": "all", ',
            {"privacy as agreed", "privacy as delivered"},
        ),
    ],
)
def test_a_file_changed_with_the_relays_help(
    made: Made, name: str, old: str, new: str, expected: set[str]
) -> None:
    text = (made.folder / name).read_text()
    assert old in text
    made.write(name, text.replace(old, new, 1))
    made.sign_log()
    assert fails(made) == expected


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        (LINES, None, {LINES}),
        (LINES, b"", {LINES}),
        (LINES, b"\n", {LINES}),
        (LINES, b"\xff\n", {LINES}),
        (LINES, b"[" * 100_000 + b"\n", {LINES}),
        ("log.json", None, {"log.json"}),
        ("log.json", b"", {"log.json"}),
        ("log.json", b"{}\n", {"log.json"}),
        (
            "privacy.json",
            b"[" * 100_000,
            {"files", "privacy as agreed", "privacy as delivered"},
        ),
        ("run.toml", b"a = " + b"[" * 5_000, {"files", "options"}),
    ],
)
def test_a_file_that_is_none(made: Made, name: str, data: bytes | None, expected) -> None:
    path = made.folder / name
    path.unlink() if data is None else path.write_bytes(data)
    assert fails(made) == expected


def test_a_line_that_is_a_tree_head(made: Made) -> None:
    head = (made.folder / "log.json").read_text()
    made.write(LINES, (made.folder / LINES).read_text() + head)
    assert fails(made) == {LINES}


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null", "."])
def test_links_that_lead_nowhere(tmp_path: Path, target: str) -> None:
    made = Made(tmp_path / "7", 1, 1, model=True)
    for path in made.folder.iterdir():
        data = path.read_bytes()
        path.unlink()
        path.symlink_to(target)
        assert fails(made)
        path.unlink()
        path.write_bytes(data)
    assert not fails(made)


def test_no_run_at_all(tmp_path: Path) -> None:
    report = verify_run(tmp_path / "none")
    assert failed(report) == {LINES, "log.json"}
    assert len(report.checks) == len(RULES) + 2
    with pytest.raises(EvidenceError, match=r"attestations.jsonl is missing"):
        load_run(tmp_path / "none")


# -- trust ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(4))
def test_a_trust_file_with_another_key_or_stage_or_nobody(made: Made, place: int) -> None:
    parties = made.trust.parties
    party = parties[place]
    others = parties[:place] + parties[place + 1 :]
    wrong = [Trust(others), Trust((*others, replace(party, key=STRANGER.public)))]
    if party.role == "trainer":
        wrong.append(Trust((*others, replace(party, stage=party.stage + 5))))
        assert verify_run(made.folder, Trust((*others, replace(party, stage=0)))).ok
    else:
        wrong.append(Trust((*others, replace(party, role="verifier"))))
    for trust in wrong:
        assert failed(verify_run(made.folder, trust)) == {"trusted keys"}


def test_an_attempt_by_strangers(tmp_path: Path) -> None:
    first = Made(tmp_path / "7")
    made = Made(tmp_path / "7", attempts=(Attempt(), Attempt("7", 1, ("trainer 2",))))
    assert failed(verify_run(made.folder, first.trust)) == {"trusted keys"}


# -- the owner's files ---------------------------------------------------------------------


def test_a_model_changed_by_one_bit_anywhere(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 2, 1, model=True)
    path = made.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    for place, own in ((len(data) - 1, {"segments of the model"}), (9, None), (0, None)):
        data[place] ^= 1
        path.write_bytes(data)
        found = fails(made)
        assert "model file" in found
        assert own is None or found >= own
        data[place] ^= 1
    path.write_bytes(data[:-1])
    assert fails(made) == {"model file", "segments of the model"}
    assert failed(verify_run(made.folder, None, tmp_path / "none")) == {
        "model file",
        "segments of the model",
    }


@pytest.mark.parametrize(
    "names", [["1"], ["1.weight", "."], ["x.y"], [".weight"], ["01.w"], []]
)
def test_a_model_of_other_tensors(tmp_path: Path, names: list[str]) -> None:
    made = Made(tmp_path / "7", 1, 1, model=True)
    tensors = {name: torch.zeros(2) for name in names}
    (made.folder / "model.safetensors").write_bytes(save(tensors))
    assert {"model file", "segments of the model"} <= fails(made)


def test_segments_exchanged(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 2, 1, model=True)
    path = made.folder / "model.safetensors"
    data = (
        path.read_bytes()
        .replace(b'"1.', b'"9.')
        .replace(b'"2.', b'"1.')
        .replace(b'"9.', b'"2.')
    )
    path.write_bytes(data)
    assert {"segments of the model", "watermarks in the model", "model file"} <= fails(made)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: replace(it, keys=it.keys | {"1": sha("x")}),
        lambda it: replace(it, keys={"1": it.keys["2"], "2": it.keys["1"]}),
        lambda it: replace(it, keys={"1": it.keys["1"]}),
        lambda it: replace(it, keys=it.keys | {"3": sha("x")}),
        lambda it: replace(it, keys={"01": it.keys["1"], "2": it.keys["2"]}),
        lambda it: replace(it, run="6"),
        lambda it: replace(it, job=sha("x")),
        lambda it: replace(it, round=2),
    ],
)
def test_other_keys_disclosed(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    made = Made(tmp_path / "7", 2, 1, disclosed=True)
    path = made.folder / "watermark.json"
    path.write_bytes(change(DisclosedKeys.parse(path.read_bytes())).to_bytes())
    assert fails(made) == {"disclosed keys"}


# -- any byte of any file ------------------------------------------------------------------


def mutated(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    match chance.randrange(8):
        case 0:
            return data[:place] + data[place + 1 :]
        case 1:
            return data[:place] + bytes([chance.randrange(256)]) + data[place:]
        case 2:
            return data[:place]
        case _:
            return (
                data[:place]
                + bytes([data[place] ^ (1 << chance.randrange(8))])
                + data[place + 1 :]
            )


@pytest.mark.parametrize(
    ("name", "times"),
    [
        (LINES, 300),
        ("log.json", 200),
        ("run.toml", 60),
        ("metrics.jsonl", 30),
        ("privacy.json", 60),
        ("watermark.json", 120),
    ],
)
def test_no_changed_byte_passes(tmp_path: Path, name: str, times: int) -> None:
    made, chance = Made(tmp_path / "7", 1, 1, disclosed=True), random.Random(name)
    path = made.folder / name
    good = path.read_bytes()
    for _ in range(times):
        path.write_bytes(bad := mutated(good, chance))
        assert fails(made) or bad == good, bad
    path.write_bytes(good)
    assert not fails(made)


def test_no_changed_byte_of_the_model_passes(tmp_path: Path) -> None:
    made, chance = Made(tmp_path / "7", 1, 1, model=True), random.Random("model")
    path = made.folder / "model.safetensors"
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    for i in range(60):
        bad = (
            mutated(good[: 8 + header], chance) + good[8 + header :]
            if i % 2
            else mutated(good, chance)
        )
        path.write_bytes(bad)
        assert "model file" in fails(made) or bad == good
    path.write_bytes(good)
    assert not fails(made)
