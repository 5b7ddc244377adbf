"""Who a node is: read from its node config, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context

from flwr_clicooper.errors import RoleError
from flwr_clicooper.options import Options, node_path

OWNER = "owner"
TRAINER = "trainer"
STANDBY = "standby"
RELAY = "relay"
OWN_FOLDER = "owner-checkpoints"
"""Where the owner keeps its own part of closed rounds, in the folder of a run."""


@dataclass(frozen=True)
class Role:
    """A node's place in the chain.

    Attributes
    ----------
    name : str
        `owner`, `trainer` or `standby`.
    stage : int
        1 to N for a trainer, else 0.
    simulated : int
        Number of simulated nodes, or 0 where the node config gives the role.
    """

    name: str
    stage: int = 0
    simulated: int = 0


def role_of(node_config: Mapping[str, Any]) -> Role:
    """Return the role that a node config gives.

    Without ``role``, a simulated node's ``partition-id`` decides: 0 is the owner, i is
    the trainer of stage i.

    Raises
    ------
    RoleError
        There is no role, or role or stage is not allowed.
    """
    role, stage = node_config.get("role"), node_config.get("stage")
    if role is None and "partition-id" in node_config:
        place = int(node_config["partition-id"])
        total = int(node_config.get("num-partitions", 0))
        return Role(TRAINER if place else OWNER, place, total)
    if role not in (OWNER, TRAINER):
        raise RoleError(
            f"node-config 'role' is {role!r}; allowed is 'owner' or 'trainer', as in "
            "--node-config 'role=\"trainer\" stage=1'"
        )
    if stage is None:
        return Role(OWNER if role == OWNER else STANDBY)
    if role == OWNER or isinstance(stage, bool) or not isinstance(stage, int) or stage < 1:
        raise RoleError(
            f"node-config 'stage' is {stage!r} with role {role!r}; a trainer's stage is an "
            "integer >= 1, a standby trainer and the owner have none"
        )
    return Role(TRAINER, stage)


def run_folder(options: Options, run_id: int | str) -> Path:
    """Return the folder of a run on this machine."""
    return Path(options.run_dir).expanduser().absolute() / str(run_id)


def state_folder(options: Options, context: Context, run_id: int | str, node_id: int) -> Path:
    """Return the folder of a node's state in a run, on the machine of the context.

    Raises
    ------
    OptionError
        The node config's ``state-dir`` is not a path.
    """
    given = node_path(context.node_config, "state-dir")
    if given is None:
        root = run_folder(options, run_id) / "state"
    else:
        root = given.absolute() / str(run_id)
    return root / f"node-{node_id}"
