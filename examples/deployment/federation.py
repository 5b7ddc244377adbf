"""A Flower federation on this machine: one SuperLink, SuperNodes, and a way to run apps.

Everything listens on loopback, lives in one folder, and is stopped when the block ends.
With ``secure=True`` it uses TLS and SuperNode authentication, as across machines.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import tomli_w

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]  # so that it runs as a script

from examples.simulate import (  # noqa: E402
    BIN,
    free_ports,
    stop_processes,
    wait_until_healthy,
)

NodeConfig = Mapping[str, str | int]


class Federation:
    """A SuperLink and SuperNodes as subprocesses.

    Parameters
    ----------
    folder : Path
        Gets keys, certificates, logs and FLWR_HOME. Its path marks the processes.
    nodes : sequence of mapping
        Node config per SuperNode.
    secure : bool
        TLS, and SuperNodes that prove their key.
    environment : mapping, optional
        More environment variables.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Sequence[NodeConfig],
        *,
        secure: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self.nodes = nodes
        self.secure = secure
        self.port, *self.node_ports = free_ports(1 + len(nodes))
        self.environment = {
            **os.environ,
            **(environment or {}),
            "FLWR_HOME": str(self.folder / "home"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            # Threads that spin while they wait take the cores from the other parties.
            "OMP_WAIT_POLICY": "PASSIVE",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        self.superlink: subprocess.Popen[bytes] | None = None
        self.supernodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Federation:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.secure:
            make_certificate(self.folder)
            make_identities(self.folder, self.nodes)
        self._write_config()
        try:
            self.superlink = self._start("superlink", self._superlink_command())
            wait_until_healthy(
                self.superlink, self.port, self.folder / "superlink.log", self._ca
            )
            for index in range(len(self.nodes)):
                if self.secure:
                    self._register(index)
                self.supernodes.append(self.start_supernode(index))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start_supernode(self, index: int) -> subprocess.Popen[bytes]:
        """Start the SuperNode of a node config; return its process."""
        own = dict(self.nodes[index])
        if self.secure:
            own["identity-key"] = str(self.folder / f"identity-{index}.pem")
            own["trust-file"] = str(self.folder / "trust.toml")
        config = " ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
            for key, value in own.items()
        )
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(self.node_ports[index]), "--node-config", config]
        if self.secure:
            command += ["--root-certificates", str(self.folder / "ca.crt")]
            command += ["--auth-supernode-private-key", str(self._key(index))]
        else:
            command.append("--insecure")
        return self._start(f"supernode-{index}", command, {"CLICOOPER_NODE": str(index)})

    def run(self, app: Path, run_config: str = "", *, stream: bool = True) -> dict[str, Any]:
        """Run an app to its end; return Flower's record of the run."""
        self.submit(app, run_config, stream=stream)
        return self.wait()

    def submit(self, app: Path, run_config: str = "", *, stream: bool = False) -> None:
        """Start a run."""
        command = ["flwr", "run", str(app), "local-federation"]
        command += ["--stream"] if stream else []
        command += ["-c", run_config] if run_config else []
        subprocess.run(command, env=self.environment, check=True, cwd=self.folder)

    def wait(self, timeout: float = 600.0) -> dict[str, Any]:
        """Wait for the newest run's end; return Flower's record of it."""
        deadline = time.monotonic() + timeout
        while True:
            run = self.newest_run()
            if run["status"].startswith("finished"):
                return run
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run is still {run['status']} after {timeout:.0f} s")
            time.sleep(0.5)

    def newest_run(self) -> dict[str, Any]:
        """Return Flower's record of the newest run."""
        command = ["flwr", "ls", "local-federation", "--format", "json"]
        listing = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True
        )
        run: dict[str, Any] = json.loads(listing.stdout)["runs"][0]
        return run

    def stop(self) -> None:
        """Stop everything that was started here."""
        for process in [*self.supernodes, *([self.superlink] if self.superlink else [])]:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in [*self.supernodes, *([self.superlink] if self.superlink else [])]:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        stop_processes(self.environment["FLWR_HOME"])

    # -- set-up ------------------------------------------------------------------

    @property
    def _ca(self) -> str | None:
        return str(self.folder / "ca.crt") if self.secure else None

    def _key(self, index: int) -> Path:
        return self.folder / f"supernode-{index}.key"

    def _superlink_command(self) -> list[str]:
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        if not self.secure:
            return [*command, "--insecure"]
        for flag, name in (
            ("cert", "server.pem"),
            ("key", "server.key"),
            ("ca-cert", "ca.crt"),
        ):
            command += [f"--ssl-{flag}file", str(self.folder / name)]
        return [*command, "--enable-supernode-auth"]

    def _start(
        self, name: str, command: list[str], more: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                env={**self.environment, **(more or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )

    def _write_config(self) -> None:
        connection: dict[str, Any] = {"address": f"127.0.0.1:{self.port}"}
        if self.secure:
            connection["root-certificates"] = str(self.folder / "ca.crt")
        else:
            connection["insecure"] = True
        home = Path(self.environment["FLWR_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        config = {"superlink": {"default": "local-federation", "local-federation": connection}}
        (home / "config.toml").write_text(tomli_w.dumps(config))

    def _register(self, index: int) -> None:
        make_supernode_key(self._key(index))
        public = self._key(index).with_suffix(".key.pub")
        command = ["flwr", "supernode", "register", str(public), "local-federation"]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL)


def make_supernode_key(path: Path) -> None:
    """Write an ECDSA key pair as Flower's SuperNodes use it, the private key owner-only."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    _write_private(path, private)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".key.pub").write_bytes(public)


def make_identities(folder: Path, nodes: Sequence[NodeConfig]) -> None:
    """Write an identity per node, and the trust file that lists them all."""
    from flwr_clicooper.provenance.keys import Identity
    from flwr_clicooper.provenance.trust import Party, Trust

    trust_file = folder / "trust.toml"
    trust_file.unlink(missing_ok=True)
    for index, node in enumerate(nodes):
        path = folder / f"identity-{index}.pem"
        if not path.exists():
            Identity.new().save(path)
        role, stage = str(node["role"]), int(node.get("stage", 0))
        name = f"{role} {index}" if index else role
        Trust.add(trust_file, Party(name, role, Identity.load(path).public, stage))


def make_certificate(folder: Path, host: str = "localhost") -> None:
    """Write a CA and a certificate for a host and loopback: ca.crt, server.pem, server.key."""
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.now(UTC)

    def build(name: str, issuer: x509.Name | None, key: Any, signer: Any, ca: bool) -> Any:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [
            x509.DNSName(host),
            x509.DNSName("localhost"),
            x509.IPAddress(ip_address("127.0.0.1")),
        ]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=365))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
            .sign(signer, hashes.SHA256())
        )

    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = build("federation CA", None, ca_key, ca_key, True)
    server = build(host, ca.subject, key, ca_key, False)
    (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _write_private(folder / "server.key", private)


def _write_private(path: Path, data: bytes) -> None:
    path.touch(mode=0o600, exist_ok=True)
    path.chmod(0o600)
    path.write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "what",
        nargs="?",
        choices=["run", "up", "keys"],
        default="run",
        help="run: start, run the quickstart, stop. up: start, and stop on Ctrl-C. "
        "keys: only make certificates and keys, as compose.yaml needs them",
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo" / "federation")
    parser.add_argument("--trainers", type=int, default=3)
    parser.add_argument("--host", default="localhost", help="keys: the SuperLink's name")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    if arguments.what == "keys":
        make_keys(folder, arguments.trainers, arguments.host)
        return 0
    with Federation(folder, chain_of(arguments.trainers), secure=True) as federation:
        if arguments.what == "up":
            stay(federation)
            return 0
        run = federation.run(ROOT / "examples" / "quickstart", f"run-dir='{ROOT / 'runs'}'")
    if run["status"] != "finished:completed":
        print(f"The run failed: {run['status']} {run['status-details']}", file=sys.stderr)
        return 1
    return 0


def make_keys(folder: Path, trainers: int, host: str) -> None:
    """Make the SuperLink's certificate and a key per SuperNode."""
    folder.mkdir(parents=True, exist_ok=True)
    make_certificate(folder, host)
    for index in range(1 + trainers):
        make_supernode_key(folder / f"supernode-{index}.key")
    make_identities(folder, chain_of(trainers))
    print(
        f"{folder}: ca.crt, server.pem, server.key, {1 + trainers} SuperNode keys, as many "
        "identities and the trust.toml that lists them"
    )


def chain_of(trainers: int) -> list[NodeConfig]:
    """Return the node configs of an owner and some trainers."""
    chain: list[NodeConfig] = [{"role": "owner"}]
    return chain + [{"role": "trainer", "stage": stage + 1} for stage in range(trainers)]


def stay(federation: Federation) -> None:
    """Say how to use a federation that is up; return on Ctrl-C."""
    print(f"A SuperLink and {len(federation.nodes)} SuperNodes are up, logs and keys in")
    print(f"    {federation.folder}")
    print("Run an app in another terminal:")
    print(f"    export FLWR_HOME={federation.environment['FLWR_HOME']}")
    print("    flwr run examples/quickstart local-federation --stream")
    print("Ctrl-C stops everything.", flush=True)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
