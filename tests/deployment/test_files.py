"""The files of examples/deployment name things that exist."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from examples.simulate import BIN
from flwr_clicooper.chain.roles import role_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "deployment"
pytestmark = pytest.mark.deployment


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return found


@pytest.mark.parametrize("service", ["superlink", "owner", "trainer-1", "trainer-3"])
def test_compose_uses_flags_that_flower_has(service: str) -> None:
    program, *arguments = shlex.split(services()[service]["command"])
    answer = subprocess.run(
        [BIN / program, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    flags = [argument for argument in arguments if argument.startswith("--")]
    assert len(flags) >= 3
    assert not [flag for flag in flags if flag not in answer]


def test_compose_makes_a_whole_chain() -> None:
    roles = []
    for service in services().values():
        words = shlex.split(service["command"])
        if "--node-config" in words:
            config = words[words.index("--node-config") + 1]
            pairs = (pair.split("=") for pair in config.split())
            values = {k: int(v) if v.isdigit() else v.strip('"') for k, v in pairs}
            roles.append(role_of(values))
    assert [(role.name, role.stage) for role in roles] == [
        ("owner", 0),
        ("trainer", 1),
        ("trainer", 2),
        ("trainer", 3),
    ]


def test_keys_are_made_as_compose_mounts_them(tmp_path: Path) -> None:
    script = [sys.executable, str(FOLDER / "federation.py"), "keys", "--host", "superlink"]
    subprocess.run([*script, "--folder", str(tmp_path)], check=True, cwd=tmp_path)
    mounted = {
        Path(volume.split(":")[0]).name
        for service in services().values()
        for volume in service.get("volumes", [])
        if "/keys/" in volume
    }
    each = {name for i in range(4) for name in (f"supernode-{i}.key", f"identity-{i}.pem")}
    assert mounted == {"ca.crt", "server.pem", "server.key", "trust.toml"} | each
    for name in mounted:
        secret = name.endswith(".key") or name.startswith("identity")
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) & 0o077 == 0 or not secret
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "superlink" in names.get_values_for_type(x509.DNSName)
    load_ssh_public_key((tmp_path / "supernode-0.key.pub").read_bytes())


def test_the_image_copies_files_that_exist() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]
