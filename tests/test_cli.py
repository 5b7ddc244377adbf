"""The command line: what it prints, what it makes, and its exit codes."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from flwr_clicooper.cli import main
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.trust import Trust
from tests.commands import calls

KEY = str(Identity.new().public)


def test_keygen_makes_an_identity_and_says_how_to_use_it(tmp_path: Path, capsys) -> None:
    path = tmp_path / "it's my.pem"
    assert calls("keygen", path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    public = Identity.load(path).public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.search(rf"^public key +{public}$", out, re.M)
    assert re.search(rf"^fingerprint +{public.fingerprint}$", out, re.M)
    # The entry is a trust file's.
    entry = out[out.index("[[party]]") : out.index("which this does")]
    assert Trust.parse(entry).parties[0].key == public
    # A shell and Flower's syntax give the path back.
    config = re.search(r"--node-config (.*)", out)
    fields = dict(part.split("=", 1) for part in re.findall(r'[\w-]+="[^"]*"', config[1]))
    given = shlex.split(config[1])[0]
    assert f'identity-key="{path}"' in given
    assert fields["role"] == '"trainer"'
    # Nothing of the secret is printed.
    assert path.read_text().splitlines()[1] not in out


def test_the_commands_that_keygen_prints_work(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert calls("keygen", "me.pem") == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert calls(*shlex.split(line)[1:]) == 0
    (party,) = Trust.load(tmp_path / "trust.toml").parties
    assert party.key == Identity.load(tmp_path / "me.pem").public


def test_keygen_does_not_overwrite(tmp_path: Path, capsys) -> None:
    path = tmp_path / "me.pem"
    path.write_text("mine")
    assert calls("keygen", path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"clicooper: {path} exists; an identity is never overwritten\n"
    assert path.read_text() == "mine"


def test_trust_lists_and_shows(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    path, keys = tmp_path / "trust.toml", [Identity.new().public for _ in range(3)]
    assert calls("trust", path, "add", "[bold]hospital", "owner", keys[0]) == 0
    assert calls("trust", path, "add", "acme", "trainer", keys[1], "--stage", 2) == 0
    assert calls("trust", path, "add", "beta", "trainer", keys[2]) == 0
    assert f"'acme' as trainer 2 ({keys[1].fingerprint})" in capsys.readouterr().out
    parties = Trust.load(path).parties
    assert [(p.name, p.role, p.stage, p.key) for p in parties] == [
        ("[bold]hospital", "owner", 0, keys[0]),
        ("acme", "trainer", 2, keys[1]),
        ("beta", "trainer", 0, keys[2]),
    ]
    assert calls("trust", path, "show") == 0
    rows = [line.split("│")[1:5] for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if row]
    assert rows == [
        ["[bold]hospital", "owner", keys[0].fingerprint, str(keys[0])],
        ["acme", "trainer 2", keys[1].fingerprint, str(keys[1])],
        ["beta", "any trainer", keys[2].fingerprint, str(keys[2])],
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trust", "{}/none.toml", "show"], "cannot be read"),
        (["trust", "{}/t.toml", "add", "a", "trainer", "ed25519:x"], "not a public key"),
        (["trust", "{}/t.toml", "add", "a", "owner", KEY, "--stage", "1"], "only a trainer"),
        (["trust", "{}/t.toml", "add", "", "owner", KEY], "0 characters"),
        (["trust", "{}/none/t.toml", "add", "a", "owner", KEY], "cannot be written"),
        (["keygen", "{}/none/me.pem"], "cannot be written"),
    ],
)
def test_named_errors_are_exit_code_1(tmp_path: Path, capsys, argv, message: str) -> None:
    assert calls(*(part.format(tmp_path) for part in argv)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("clicooper: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["keygen"], "PATH"),
        (["trust", "t.toml"], "ACTION"),
        (["trust", "t.toml", "add", "a", "boss", KEY], "invalid choice: 'boss'"),
        (["trust", "t.toml", "add", "a", "trainer", KEY, "--stage", "0"], "integer from 1"),
        (["trust", "t.toml", "add", "a", "trainer", KEY, "--stage", "x"], "integer from 1"),
    ],
)
def test_wrong_calls_are_exit_code_2(capsys, argv, message: str) -> None:
    assert calls(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: clicooper" in err
    assert message in err


def test_help_names_the_commands(capsys) -> None:
    assert calls("--help") == 0
    out = capsys.readouterr().out
    assert "keygen" in out
    assert "trust" in out


def test_the_installed_command_is_this_one() -> None:
    root = Path(__file__).parent.parent
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["clicooper"].partition(":")
    assert getattr(import_module(module), name) is main


def test_neither_flower_nor_pytorch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from flwr_clicooper.cli import main\n"
        f"assert main(['keygen', 'me.pem']) == 0\n"
        f"assert main(['trust', 't.toml', 'add', 'a', 'owner', '{KEY}']) == 0\n"
        "assert main(['trust', 't.toml', 'show']) == 0\n"
        "loaded = {'torch', 'flwr', 'numpy', 'ray'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=path)
    done = subprocess.run(
        [sys.executable, "-m", "flwr_clicooper.cli", "keygen", "me.pem"],
        check=False,
        cwd=tmp_path,
        env=path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "never overwritten" in done.stderr
