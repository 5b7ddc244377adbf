from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flwr_clicooper.errors import OptionError
from flwr_clicooper.options import Options, task_config

DP = {"release": "central-dp", "epsilon": 1.0, "head": "public"}


def test_defaults_are_the_documented_ones() -> None:
    config = Options.from_config({"release": "clean"}).as_config()
    assert config == {
        "release": "clean",
        "epsilon": 0.0,
        "delta": 1e-5,
        "clip": 1.0,
        "privacy-unit": "record",
        "head": "",
        "class-scores": 0,
        "label-expansion": 0,
        "label-epsilon": 0.0,
        "num-rounds": 5,
        "batch-size": 256,
        "microbatches": 1,
        "schedule": "lockstep",
        "pipeline": "1f1b",
        "label-side": "trainer",
        "learning-rate": 0.05,
        "seal": True,
        "attest": True,
        "watermark": True,
        "audit-every": 0,
        "relay-key": "",
        "link": "live",
        "live-address": "127.0.0.1",
        "live-port": 0,
        "live-listen": "",
        "live-insecure": False,
        "shuffle": True,
        "seed": 0,
        "timeout": 600.0,
        "owner-timeout": 86400.0,
        "run-dir": "runs",
        "resume": "",
        "data-dir": "",
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "'release' is missing.*'clean', 'local-dp', 'central-dp', 'interactive'"),
        ({"release": "cleam"}, "'release' is 'cleam'; allowed is one of 'clean'"),
        ({"microbatch": 2}, "unknown option 'microbatch': did you mean 'microbatches'"),
        ({"lr": 0.1}, r"unknown option 'lr'.*task\.lr"),
        ({"num-rounds": 0}, "'num-rounds' is 0; allowed is an integer >= 1"),
        ({"num-rounds": 1.0}, "'num-rounds' is 1.0"),
        ({"num-rounds": True}, "'num-rounds' is True"),
        ({"batch-size": "256"}, "'batch-size' is '256'"),
        ({"timeout": float("nan")}, "'timeout' is nan"),
        ({"timeout": 0}, "'timeout' is 0; allowed is a number > 0"),
        ({"learning-rate": -1.0}, "'learning-rate' is -1.0"),
        ({"seed": -1}, "'seed' is -1"),
        ({"seed": 2**63}, "'seed'"),
        ({"shuffle": 1}, "'shuffle' is 1; allowed is true or false"),
        ({"pipeline": "GPipe"}, "allowed is one of 'gpipe', '1f1b'"),
        ({"schedule": "async"}, "allowed is one of 'lockstep', 'local'"),
        ({"label-side": "both"}, "allowed is one of 'trainer', 'owner'"),
        ({"run-dir": ""}, "'run-dir'"),
        ({"link": "mail"}, "allowed is one of 'live', 'mailbox'"),
        ({"live-port": 70000}, "an integer from 0 to 65535"),
        ({"live-listen": "9000"}, "`host:port`"),
        ({"live-listen": "relay:99999"}, "`host:port`"),
        ({"owner-timeout": 0}, "a number > 0"),
        ({"live-address": ""}, "a host name or IP address"),
        ({"schedule": "local", "release": "interactive"}, "the head cannot train"),
        ({"schedule": "local", "label-side": "owner"}, "each trainer needs the labels"),
        ({"epsilon": -1.0}, "'epsilon' is -1.0; allowed is a number >= 0"),
        ({"delta": 1.0}, "'delta' is 1.0; allowed is a number between 0 and 1"),
        ({"clip": 0.0}, "'clip' is 0.0"),
        ({"privacy-unit": "user"}, "allowed is one of 'record', 'element'"),
        ({"head": "pretrained"}, "'head' is 'pretrained'; allowed is 'public', 'random'"),
        ({"label-expansion": -1}, "'label-expansion' is -1"),
        ({"label-epsilon": -0.5}, "'label-epsilon' is -0.5"),
        ({"release": "local-dp"}, "'epsilon' is missing"),
        ({"release": "central-dp"}, "'epsilon' is missing"),
        ({"epsilon": 1.0}, "'release' is 'clean', which adds no noise"),
        ({"release": "local-dp", "epsilon": 1.0}, "'head' is missing"),
        ({"release": "interactive", "epsilon": 1.0}, "'head' is missing"),
        (DP | {"head": "private"}, "carry other records than their own"),
        (DP | {"privacy-unit": "element"}, "synthetic rows are private per record"),
        (DP | {"class-scores": 3}, "is for release = 'local-dp' with privacy-unit"),
        ({"class-scores": 1}, "'class-scores' is 1; allowed is an integer >= 2, or 0"),
        (DP | {"label-side": "owner"}, "labels of synthetic rows are released"),
        (DP | {"label-epsilon": 1.0}, "covers the labels already"),
        ({"label-side": "owner", "label-expansion": 2}, "labels do not leave the owner"),
        ({"schedule": "local", "microbatches": 2}, "no pipeline to fill"),
    ],
)
def test_refused(config: dict[str, Any], message: str) -> None:
    full = config if not config else {"release": "clean", **config}
    with pytest.raises(OptionError, match=message):
        Options.from_config(full)


def test_a_tasks_own_options_pass_and_reach_it() -> None:
    config = task_config({"release": "clean", "task.lr": 0.3, "data-dir": "/run"}, {})
    assert config["task.lr"] == 0.3
    assert config["batch-size"] == 256
    assert config["data-dir"] == "/run"
    node = task_config({"release": "clean", "data-dir": "/run"}, {"data-dir": "/node"})
    assert node["data-dir"] == "/node"


def test_the_readme_shows_the_table_of_options() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert Options.table() in readme


def test_the_quickstart_lists_every_option_since_flwr_run_overrides_no_other() -> None:
    text = (Path(__file__).parent.parent / "examples/quickstart/pyproject.toml").read_text()
    section = text.split("[tool.flwr.app.config]")[1]
    keys = re.findall(r"^([a-z-]+) = ", section, re.MULTILINE)
    assert set(keys) == set(Options.from_config({"release": "clean"}).as_config())
