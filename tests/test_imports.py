"""A stock SuperNode starts a process per message: imports must stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "statement",
    [
        "import flwr_clicooper",
        "from flwr_clicooper import CooperStrategy, LiveGrid, LocalGrid, SplitTask",
        "from flwr_clicooper import cooper_client, SplitTask; cooper_client(SplitTask())",
    ],
)
def test_no_pytorch_before_it_is_needed(statement: str) -> None:
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    import flwr_clicooper

    for name in flwr_clicooper.__all__:
        assert getattr(flwr_clicooper, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flwr_clicooper.nothing
