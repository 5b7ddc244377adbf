"""`clicooper claim`: whose watermarks a model carries, and its exit codes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flwr_clicooper.commands.claim import PERMUTED, ranges
from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.evidence import DisclosedKeys, OwnKeys
from tests.commands import calls
from tests.provenance.runs import Attempt, Made


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path / "7", 2, 3, model=True)
    made.write_trust(tmp_path / "trust.toml")
    return made


def claimed(capsys, *argv: object) -> tuple[int, dict[str, Any]]:
    code = calls("claim", *argv, "--json")
    return code, json.loads(capsys.readouterr().out)


def own_keys(made: Made, segment: int, *rounds: int) -> OwnKeys:
    keys = {str(it): made.key(segment, it).hex() for it in rounds}
    return OwnKeys(keys, made.jobs[-1].run, segment)


def write(keys: OwnKeys, folder: Path) -> Path:
    path = folder / keys.file_name
    path.write_bytes(keys.to_bytes())
    return path


def model_of(made: Made) -> Path:
    return made.folder / "model.safetensors"


def test_the_delivered_model_has_the_last_watermarks(
    made: Made, tmp_path: Path, capsys
) -> None:
    argv = ("--model", model_of(made), "--run", made.folder)
    assert calls("claim", *argv, "--trust", tmp_path / "trust.toml") == 0
    lines = capsys.readouterr().out.splitlines()
    names = {p.key: p.name for p in made.trust.parties}
    one, two = (names[made.jobs[0].party("trainer", s)] for s in (1, 2))
    assert lines[0] == (
        f"This model carries watermarks by {one} in segment 1 of round 3; "
        f"by {two} in segment 2 of round 3."
    )
    assert f"No key was given for segment 1 by {one}: rounds 1 to 2." in lines
    assert lines[-1] == PERMUTED


def test_the_bound_accounts_for_every_comparison(made: Made, capsys) -> None:
    code, found = claimed(capsys, "--model", model_of(made), "--run", made.folder)
    assert (code, found["format"], found["accepted"]) == (0, "flwr-clicooper/claim/v1", True)
    assert [it["matches"] for it in found["findings"]] == [256, 256]
    assert found["tests"] == 4  # as a segment of the model, and as one segment
    assert {it["log2_false_positive"] for it in found["findings"]} == {-254.0}
    assert found["findings"][0]["fingerprint"] == made.jobs[0].party("trainer", 1).fingerprint
    assert [(it["segment"], it["round"]) for it in found["without-key"]] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]


def test_one_segment_alone_is_enough(made: Made, tmp_path: Path, capsys) -> None:
    own = {
        name.removeprefix("2."): tensor
        for name, tensor in load_file(model_of(made)).items()
        if name.startswith("2.")
    }
    save_file(own, tmp_path / "suspect.safetensors")
    argv = ("--model", tmp_path / "suspect.safetensors", "--run", made.folder)
    code, found = claimed(capsys, *argv)
    assert code == 0
    assert [it["accepted"] for it in found["findings"]] == [False, True]


def test_another_model_has_none(made: Made, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    other = {name: torch.randn_like(it) for name, it in load_file(model_of(made)).items()}
    save_file(other, tmp_path / "other.safetensors")
    argv = ("--model", tmp_path / "other.safetensors", "--run", made.folder)
    assert calls("claim", *argv) == 1
    assert capsys.readouterr().out.startswith("This model carries none of the watermarks")
    code, found = claimed(capsys, *argv)
    assert (code, found["accepted"]) == (1, False)


def test_a_model_too_small_for_a_watermark_is_said_to_be(
    made: Made, tmp_path: Path, capsys
) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "small.safetensors")
    argv = ("--model", tmp_path / "small.safetensors", "--run", made.folder)
    code, found = claimed(capsys, *argv)
    assert code == 1
    assert all(it["skipped"] for it in found["findings"])
    assert calls("claim", *argv) == 1
    assert "no: " in capsys.readouterr().out


# -- keys ----------------------------------------------------------------------------------


def test_trainers_own_keys_are_found_in_the_folder_and_where_one_says(
    made: Made, tmp_path: Path, capsys
) -> None:
    write(own_keys(made, 1, 1, 2, 3), made.folder)
    given = write(own_keys(made, 2, 2), tmp_path)
    argv = ("--model", model_of(made), "--run", made.folder, "--keys", given)
    code, found = claimed(capsys, *argv)
    assert code == 0
    assert [(it["segment"], it["round"]) for it in found["findings"]] == [
        *((1, 1), (1, 2), (1, 3)),
        *((2, 2), (2, 3)),
    ]
    assert [(it["segment"], it["round"]) for it in found["without-key"]] == [(2, 1)]


def test_a_key_that_nobody_committed_to_is_not_compared(
    made: Made, tmp_path: Path, capsys
) -> None:
    strange = OwnKeys({"1": "ab" * 32}, "7", 1)
    argv = ("--model", model_of(made), "--run", made.folder)
    code, found = claimed(capsys, *argv, "--keys", write(strange, tmp_path))
    assert (code, found["strange-keys"], len(found["findings"])) == (0, 1, 2)
    (made.folder / "watermark.json").unlink()
    assert calls("claim", *argv, "--keys", tmp_path / strange.file_name) == 1
    out = capsys.readouterr().out
    assert out.startswith("Nothing was compared: no key is of a commitment")
    assert "Not compared: 1 key that no attestation of this run committed to." in out


def test_the_key_of_a_replayed_round_is_that_of_the_attempt_that_goes_on(
    tmp_path: Path, capsys
) -> None:
    made = Made(tmp_path / "7", 1, 3, (Attempt(), Attempt("8", 1, ("trainer 1",))), model=True)
    code, found = claimed(capsys, "--model", model_of(made), "--run", made.folder)
    assert code == 0
    assert [(it["run"], it["round"]) for it in found["findings"]] == [("8", 3)]
    others = {(it["round"], it["trainer"]) for it in found["without-key"]}
    assert others == {
        (round_, made.jobs[n].party("trainer", 1).fingerprint)
        for round_, n in ((1, 0), (2, 1))
    }


@pytest.mark.parametrize("content", [b"", b"{}", b'{"segment":1}', b"\xff"])
def test_a_file_that_holds_no_keys_is_refused(
    content: bytes, made: Made, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "watermark-1.json"
    path.write_bytes(content)
    argv = ("--model", model_of(made), "--run", made.folder, "--keys", path)
    assert calls("claim", *argv) == 1
    assert f"clicooper: {path}: " in capsys.readouterr().err


def test_keys_have_one_spelling() -> None:
    keys = OwnKeys({"2": "ab" * 32, "10": "cd" * 32}, "7", 1)
    data = keys.to_bytes()
    assert OwnKeys.parse(data) == keys
    assert keys.file_name == "watermark-1.json"
    for wrong in (
        data + b"\n",
        data.replace(b'"2"', b'"0"'),
        data.replace(b'"2"', b'"02"'),
        data.replace(b"ab", b"AB"),
        data.replace(b'"segment":1', b'"segment":0'),
    ):
        with pytest.raises(EvidenceError):
            OwnKeys.parse(wrong)
    with pytest.raises(EvidenceError):
        DisclosedKeys.parse(data)


# -- evidence and calls --------------------------------------------------------------------


def test_evidence_that_does_not_hold_proves_nothing(tmp_path: Path, capsys) -> None:
    def alter(name: str, it: Any) -> Any:
        if name != "round 2.1":
            return it
        chosen = hashlib.sha256(b"chosen later").hexdigest()
        return replace(it, watermark=replace(it.watermark, commitment=chosen))

    made = Made(tmp_path / "7", 1, 3, model=True)
    altered = alter("round 2.1", made_statement(made, "round 2.1"))
    made.replace("round 2.1", altered.payload(), made.parties["trainer 1"])
    argv = ("--model", model_of(made), "--run", made.folder)
    assert calls("claim", *argv) == 1
    error = capsys.readouterr().err
    assert "does not hold (chain in time, log, tree heads)" in error


def made_statement(made: Made, name: str) -> Any:
    from flwr_clicooper.provenance.attestation import parse_statement

    return parse_statement(made.lines[made.index(name)].payload)


def test_what_cannot_be_read_is_named(made: Made, tmp_path: Path, capsys) -> None:
    assert calls("claim", "--model", tmp_path / "none", "--run", made.folder) == 1
    assert "none is missing" in capsys.readouterr().err
    (tmp_path / "text").write_text("text")
    assert calls("claim", "--model", tmp_path / "text", "--run", made.folder) == 1
    assert "text is not a safetensors file" in capsys.readouterr().err
    assert calls("claim", "--model", model_of(made), "--run", tmp_path) == 1
    assert "attestations.jsonl is missing" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--model", "m"], ["--run", "r"], ["m", "r"]])
def test_wrong_calls(argv: list[str], capsys) -> None:
    assert calls("claim", *argv) == 2
    assert "usage: clicooper claim" in capsys.readouterr().err


def test_pytorch_waits_for_a_model(made: Made, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom flwr_clicooper.cli import main\n"
        f"main(['claim', '--model', 'none', '--run', {str(made.folder)!r}])\n"
        "assert not {'torch', 'flwr'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)


def test_rounds_in_words() -> None:
    assert ranges([3]) == "round 3"
    assert ranges([1, 2, 3]) == "rounds 1 to 3"
    assert ranges([5, 1, 2, 9]) == "rounds 1 to 2, 5, 9"
