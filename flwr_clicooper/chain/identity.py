"""Who the parties are: own identities, and whether to believe the others' introductions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log

from flwr_clicooper.chain.roles import OWNER, TRAINER, role_of
from flwr_clicooper.options import node_path
from flwr_clicooper.privacy.sealing import Introduction, check
from flwr_clicooper.provenance.keys import Identity, PublicIdentity, verify
from flwr_clicooper.provenance.trust import Pins, Trust


def own_identity(node_config: Mapping[str, Any]) -> Identity:
    """Return the node's identity: the one of ``identity-key``, or one for this run only.

    Raises
    ------
    OptionError, StateError
        ``identity-key`` is not a path, or its file is not a key that only its owner reads.
    """
    path = node_path(node_config, "identity-key")
    return Identity.load(path) if path else Identity.new()


def check_peers(
    run: str, peers: Mapping[str, tuple[int, Introduction]], context: Context
) -> None:
    """Refuse introductions that are not of who they must be.

    With a ``trust-file``, keys must be those that it lists. Without one, a node that has
    an ``identity-key`` keeps the keys it sees first, beside its own, and warns; a node
    without either can only tell that everybody is the same for the length of this run.

    Parameters
    ----------
    peers : mapping
        Stage (0 for the owner) and introduction, by party name.

    Raises
    ------
    SealError
        An introduction is of another run or party, or is not signed by its identity.
    TrustError
        A key is not the one that must be there.
    """
    for name, (_, introduction) in peers.items():
        check(introduction, run, name, verify)
    config = context.node_config
    trust_file, own = node_path(config, "trust-file"), node_path(config, "identity-key")
    is_new = partial(_is_new, trust=Trust.load(trust_file) if trust_file else None, own=own)
    new = [name for name, (stage, it) in peers.items() if is_new(stage, it)]
    if new and not role_of(config).simulated:
        log(WARNING, "%s", _warning(new, peers, kept=own is not None))


def _is_new(
    stage: int, introduction: Introduction, *, trust: Trust | None, own: Path | None
) -> bool:
    """Return whether a key is new here; raise if it may not be there."""
    role, key = (TRAINER if stage else OWNER), PublicIdentity.parse(introduction.identity)
    if trust is not None:
        trust.expect(role, stage, key)
        return False
    return own is None or Pins(own.with_name(f"{own.name}.pins")).check(role, stage, key)


def _warning(
    new: list[str], peers: Mapping[str, tuple[int, Introduction]], *, kept: bool
) -> str:
    known = [
        f"{name} {PublicIdentity.parse(peers[name][1].identity).fingerprint}" for name in new
    ]
    after = "They are kept, and others will be refused." if kept else ""
    return (
        f"no trust-file says who the others are; taken as they came: {', '.join(known)}. A "
        f"relay that lies about keys would not be noticed. {after}"
    ).strip()
