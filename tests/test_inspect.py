"""`clicooper inspect`: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.commands import calls
from tests.provenance.runs import Attempt, Made

ATTEMPTS = (Attempt(), Attempt("7", 2, ("trainer 2",)))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path / "7", 2, 3, ATTEMPTS)
    made.write_trust(tmp_path / "trust.toml")
    return made


def test_a_run_that_holds(made: Made, tmp_path: Path, capsys) -> None:
    assert calls("inspect", made.folder, "--trust", tmp_path / "trust.toml") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("The evidence holds: 23 checks passed; not checked: ")
    name = next(
        p.name for p in made.trust.parties if p.key == made.jobs[1].party("trainer", 2)
    )
    for text in (
        "3 on 100 records, batches of 16",
        "clean, schedule lockstep",
        "owner → float32[4] → segment 1 → float32[4] → segment 2",
        "Nothing leaves.",
        f"hand-over after round 2: segment 2 to {name}",
        "accuracy 0.75, loss 0.5, as the owner says",
    ):
        assert text in out
    rows = [line.split() for line in lines if line.endswith("passed") or "passed  " in line]
    rounds = [row for row in rows if "256" in row]
    assert len(rounds) == 3 * 2
    assert "unknown: pass --trust" not in out


def test_what_failed_is_at_the_top(made: Made, capsys) -> None:
    made.write("metrics.jsonl", "{}\n")
    del made.lines[made.index("round 2.1")]
    made.write_lines()
    assert calls("inspect", made.folder) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAILED: complete, chain in time, chain of segments")
    assert lines[1].startswith("  complete: round 2 of segment 1 is missing (in ")
    assert any(line.startswith("  files: the file is not the one") for line in lines)
    assert "Whose keys these are is unknown: pass --trust with a file." in lines


def test_a_folder_without_a_run(tmp_path: Path, capsys) -> None:
    assert calls("inspect", tmp_path, "--html", tmp_path / "page.html") == 1
    out = capsys.readouterr().out
    assert out.startswith("FAILED: attestations.jsonl, log.json. Do not rely on this run.")
    assert "There are no statements to show." in (tmp_path / "page.html").read_text()


def test_without_a_readable_tree_head_the_rest_is_shown(made: Made, capsys) -> None:
    (made.folder / "log.json").unlink()
    assert calls("inspect", made.folder) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAILED: log.json")
    assert "hand-over after round 2" in out


def test_json_for_machines(made: Made, tmp_path: Path, capsys) -> None:
    made.write("metrics.jsonl", "{}\n")
    trust = tmp_path / "trust.toml"
    assert calls("inspect", made.folder, "--trust", trust, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["run"], found["ok"]) == (
        "flwr-clicooper/inspect/v1",
        "7",
        False,
    )
    assert len(found["statements"]) == len(made.lines) - len(ATTEMPTS) - 1
    it = found["statements"][-1]
    assert (it["attempt"], it["kind"], it["round"], it["segment"]) == (2, "round", 3, 2)
    assert (it["steps"], it["records"], it["outcome"], it["wrong"]) == (7, 100, "passed", [])
    assert it["watermark"]["matches"] == 256
    assert it["key"] == str(made.jobs[1].party("trainer", 2))
    assert [attempt["after"] for attempt in found["attempts"]] == [0, 2]
    assert found["delivery"]["metrics"] == {"accuracy": 0.75, "loss": 0.5}
    assert found["log"]["size"] == len(made.lines)
    assert {party["role"] for party in found["parties"]} == {
        *("owner", "trainer 1", "trainer 2", "relay")
    }
    assert found["verify"]["ok"] is False


def test_a_page_is_written(made: Made, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.html"
    assert calls("inspect", made.folder, "--html", page) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert f"{page} has this as a page" in capsys.readouterr().out.replace("\n", "")
    assert calls("inspect", made.folder, "--html", tmp_path / "none" / "page.html") == 1
    assert "clicooper: " in capsys.readouterr().err


def test_what_came_with_the_evidence_does_nothing_to_the_terminal(
    tmp_path: Path, capsys
) -> None:
    def alter(name: str, it: Any) -> Any:
        if name == "delivery":
            return replace(it, metrics={"[red]x[/red]": 1.0})
        return it

    made = Made(tmp_path / "7", alter=alter)
    made.write("privacy.json", json.dumps({"words": "[bold]\u202e\x1b[31mred"}))
    assert calls("inspect", made.folder) == 1
    out = capsys.readouterr().out
    assert "[red]x[/red] 1" in out
    assert "[bold]??[31mred" in out
    assert "\u202e" not in out


def test_pytorch_is_not_needed(made: Made, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom flwr_clicooper.cli import main\n"
        f"code = main(['inspect', {str(made.folder)!r}, '--html', {str(tmp_path / 'p')!r}])\n"
        "assert code == 0\n"
        "assert not {'torch', 'flwr'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)
