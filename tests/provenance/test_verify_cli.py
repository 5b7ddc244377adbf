"""`clicooper verify`, `proof` and `check-proof`: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flwr_clicooper.provenance.evidence import load_run
from flwr_clicooper.provenance.fields import canonical
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.proof import Proof, check_proof
from flwr_clicooper.provenance.trust import Trust
from flwr_clicooper.provenance.verify import RULES
from tests.commands import calls
from tests.provenance.runs import Attempt, Made, failed, sha

NAMES = ["attestations.jsonl", "log.json", *(rule.name for rule in RULES)]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path / "7", 3, 3, (Attempt(), Attempt("8", 2, ("relay", "trainer 1"))))
    made.write_trust(tmp_path / "trust.toml")
    return made


def trust_of(made: Made) -> Path:
    return made.folder.parent / "trust.toml"


# -- verify --------------------------------------------------------------------------------


def test_a_table_with_every_check_and_what_to_do(made: Made, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    assert calls("verify", made.folder, "--trust", trust_of(made)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in lines if "│" in line]
    assert [row[0] for row in rows] == NAMES
    assert {row[1] for row in rows} == {"passed", "not checked"}
    assert (
        lines[-1] == "All that was checked of run 8 holds. Checks that could not be made: 4."
    )

    assert calls("verify", made.folder) == 0
    last = " ".join(capsys.readouterr().out.split("┘")[1].split())
    assert last.startswith(
        "Nothing failed, but nothing says whose keys these are: pass --trust"
    )

    made.write("metrics.jsonl", "{}\n")
    assert calls("verify", made.folder) == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("│ files"))
    assert "failed" in row
    assert "in metrics.jsonl" in out
    assert "A file of the run was changed, or is of another run." in out
    assert out.splitlines()[-1].startswith("FAILED: files. Do not rely on this evidence")


def test_json_for_machines(made: Made, capsys) -> None:
    assert calls("verify", made.folder, "--trust", trust_of(made), "--json") == 0
    good = json.loads(capsys.readouterr().out)
    assert (good["format"], good["run"], good["ok"]) == ("flwr-clicooper/verify/v1", "8", True)
    (made.folder / "log.json").unlink()
    assert calls("verify", made.folder, "--json") == 1
    bad = json.loads(capsys.readouterr().out)
    assert bad["ok"] is False
    for report in (good, bad):
        assert set(report) == {"format", "run", "ok", "checks"}
        assert [check["name"] for check in report["checks"]] == NAMES
        for check in report["checks"]:
            assert set(check) == {"name", "outcome", "what", "where", "meaning"}
            assert check["outcome"] in ("passed", "failed", "not checked")
            is_failed = check["outcome"] == "failed"
            assert check["what"]
            assert bool(check["where"]) == bool(check["meaning"]) == is_failed


def test_a_folder_without_a_run_fails(tmp_path: Path, capsys) -> None:
    assert calls("verify", tmp_path) == 1
    assert "attestations.jsonl is missing" in " ".join(capsys.readouterr().out.split())


def test_a_trust_file_that_is_none_is_an_error(made: Made, capsys) -> None:
    assert calls("verify", made.folder, "--trust", made.folder / "none") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("clicooper: the trust file ")


@pytest.mark.parametrize(
    "argv",
    [
        ["verify"],
        ["verify", "a", "b"],
        ["verify", "a", "--modle", "m"],
        ["proof", "a", "--segment", "1"],
        ["proof", "a", "--segment", "x", "--round", "1"],
        ["check-proof"],
    ],
)
def test_wrong_calls(argv: list[str], capsys) -> None:
    assert calls(*argv) == 2
    assert "usage: clicooper" in capsys.readouterr().err


def test_what_came_with_the_evidence_does_nothing_to_the_terminal(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    evil = "[red]\u202ex[/red]"

    def alter(name: str, it: Any) -> Any:
        return replace(it, run="[red]6[/red]") if name == "round 1.1" else it

    made = Made(tmp_path / "7", alter=alter)
    made.write("run.toml", f'[run]\nid = "7"\n[options]\n"{evil}" = 1\n')
    assert calls("verify", made.folder) == 1
    out = capsys.readouterr().out
    assert "it is of run '[red]6[/red]'" in out
    assert "\u202e" not in out


def run_alone(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", code]
    return subprocess.run(
        argv, check=False, cwd=folder, env=env, capture_output=True, text=True
    )


def test_a_stranger_verifies_with_nothing_but_the_run_and_a_trust_file(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 2, 2, model=True)
    text = "\n".join(party.to_toml() for party in made.trust.parties)
    away = tmp_path / "away"
    away.mkdir()
    (away / "trust.toml").write_text(text)
    names = ("attestations.jsonl", "log.json", "run.toml", "metrics.jsonl", "privacy.json")
    (away / "run").mkdir()
    for name in names:
        shutil.copy(made.folder / name, away / "run" / name)
    code = (
        "import sys\n"
        "for name in ('torch', 'flwr', 'numpy'): sys.modules[name] = None\n"
        "from flwr_clicooper.cli import main\n"
        "sys.exit(main(['verify', 'run', '--trust', 'trust.toml', '--json']))\n"
    )
    done = run_alone(away, code)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    absent = [c["name"] for c in report["checks"] if c["outcome"] == "not checked"]
    assert absent == [
        "disclosed keys",
        "watermarks in the model",
        "model file",
        "segments of the model",
    ]
    # With the model and the keys, only the search for watermarks needs PyTorch.
    for name in ("model.safetensors", "watermark.json"):
        shutil.copy(made.folder / name, away / "run" / name)
    report = json.loads(run_alone(away, code).stdout)
    (check,) = [c for c in report["checks"] if c["outcome"] == "not checked"]
    assert (report["ok"], check["name"]) == (True, "watermarks in the model")
    assert check["what"] == "PyTorch is not installed; it is needed to look for them"


def test_without_a_model_neither_flower_nor_pytorch_is_loaded(made: Made) -> None:
    code = (
        "import sys; from flwr_clicooper.cli import main\n"
        f"assert main(['verify', {str(made.folder)!r}]) == 0\n"
        f"assert main(['proof', {str(made.folder)!r}, '--segment=1', '--round=1', "
        "'--out=p']) == 0\n"
        "assert main(['check-proof', 'p']) == 0\n"
        "loaded = {'torch', 'flwr', 'numpy', 'ray'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert run_alone(made.folder.parent, code).stderr == ""


# -- proofs --------------------------------------------------------------------------------


def test_a_proof_stands_alone(made: Made, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out, trust = made.folder.parent / "proof.json", trust_of(made)
    for segment in (1, 2, 3):
        for round_ in range(4):
            argv = ("proof", made.folder, "--segment", segment, "--round", round_)
            assert calls(*argv, "--out", out) == 0
            assert calls("check-proof", out, "--trust", trust) == 0
            kind = "round" if round_ else "start"
            assert (
                f"run {'8' if round_ == 3 else '7'}, segment {segment}, {kind} {round_}: "
                in (capsys.readouterr().out)
            )
            assert calls(*argv) == 0
            assert capsys.readouterr().out == out.read_text()
    assert calls("check-proof", out, "--trust", trust, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert calls("check-proof", out) == 0
    assert "pass --trust" in capsys.readouterr().out


@pytest.mark.parametrize(("segment", "round_"), [(4, 1), (0, 1), (1, 4), (1, -1), (9, 0)])
def test_no_proof_of_what_is_not_there(made: Made, capsys, segment: int, round_: int) -> None:
    assert calls("proof", made.folder, "--segment", segment, f"--round={round_}") == 1
    assert "has no statement" in capsys.readouterr().err


def test_no_proof_of_a_run_that_is_damaged(made: Made, capsys) -> None:
    del made.lines[-1]
    made.write_lines()
    assert calls("proof", made.folder, "--segment", 1, "--round", 1) == 1
    assert "not over the lines" in capsys.readouterr().err
    assert calls("check-proof", made.folder / "none") == 1
    assert calls("check-proof", made.folder / "log.json") == 1


def proof_of(made: Made) -> Proof:
    return Proof.of_run(load_run(made.folder), 2, 1)


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (lambda it, _: replace(it, index=it.index + 1), {"log"}),
        (lambda it, _: replace(it, size=it.size + 1), {"log"}),
        (lambda it, _: replace(it, path=it.path[1:]), {"log"}),
        (lambda it, _: replace(it, path=(sha("x"), *it.path[1:])), {"log"}),
        (lambda it, _: replace(it, jobs=it.jobs[:1]), {"log"}),
        (lambda it, _: replace(it, jobs=it.jobs[1:]), {"jobs", "place", "signature"}),
        (lambda it, _: replace(it, jobs=it.jobs[::-1]), {"jobs", "log"}),
        (lambda it, other: replace(it, head=other.head), {"log"}),
        (
            lambda it, other: replace(it, envelope=other.envelope),
            {"place", "signature", "log"},
        ),
        (lambda it, _: replace(it, envelope=it.jobs[0]), {"proof"}),
        (lambda it, _: replace(it, head=it.jobs[0]), {"proof"}),
        (lambda it, _: replace(it, jobs=[it.envelope]), {"proof"}),
    ],
)
def test_a_proof_of_something_else(made: Made, change: Any, fails: set[str]) -> None:
    other = proof_of(Made(made.folder.parent / "other", 3, 3, task_option=2.0))
    bad = change(proof_of(made), other)
    report = check_proof(bad.to_bytes(), made.trust)
    assert failed(report) >= fails, report.failed
    assert not report.ok


def test_a_proof_by_strangers(made: Made) -> None:
    data = proof_of(made).to_bytes()
    assert check_proof(data, made.trust).ok
    stranger = replace(made.trust.parties[0], key=Identity.new().public)
    report = check_proof(data, Trust((stranger, *made.trust.parties[1:])))
    assert failed(report) == {"trusted keys"}


def test_a_changed_byte_of_a_proof(made: Made) -> None:
    good = proof_of(made).to_bytes()
    for place in range(0, len(good), 17):
        bad = good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :]
        assert not check_proof(bad, made.trust).ok, place
    assert not check_proof(good + b"\n").ok
    assert not check_proof(canonical({})).ok
    assert not check_proof(b"").ok
