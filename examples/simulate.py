"""Run a Flower app in simulation, and say truly whether it worked.

``flwr run`` exits 0 when the run failed, and leaves the SuperLink that it started
running. This starts a SuperLink of its own on free loopback ports, runs the app, shows
its log, asks Flower how the run ended, and stops everything that it started.

    python examples/simulate.py examples/quickstart --nodes 4 -c "num-rounds=2"
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

BIN = Path(sys.executable).parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("app", type=Path, help="folder of the Flower app")
    parser.add_argument("--nodes", type=int, required=True, help="simulated nodes")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs per simulated node")
    parser.add_argument("--actors", type=int, default=0, help="Ray actors, default --nodes")
    parser.add_argument("-c", "--run-config", default="", help="overrides, as in flwr run")
    arguments = parser.parse_args()
    run = simulate(
        arguments.app,
        arguments.nodes,
        arguments.run_config,
        arguments.cpus,
        arguments.actors,
    )
    if run["status"] != "finished:completed":
        details = run.get("status-details", "")
        print(f"The run failed: {run['status']} {details}", file=sys.stderr)
        return 1
    return 0


def simulate(
    app: Path, nodes: int, run_config: str = "", cpus: int = 2, actors: int = 0
) -> dict[str, Any]:
    """Run an app in simulation with its log on standard output.

    Parameters
    ----------
    app : Path
        Folder with the app's ``pyproject.toml``.
    nodes : int
        Simulated nodes.
    run_config : str
        Overrides as ``flwr run -c`` takes them.
    cpus : int
        CPUs, and so threads, per node.
    actors : int
        Ray actors that serve the nodes; 0 for one per node.

    Returns
    -------
    dict
        Flower's record of the run; its ``status`` is ``finished:completed`` only if the
        run worked.
    """
    with tempfile.TemporaryDirectory(prefix="flwr-") as home:
        runtime, control = free_ports(2)
        environment = {
            **os.environ,
            "FLWR_HOME": home,
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(runtime),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            # Threads that spin while they wait take the cores from the other parties.
            "OMP_WAIT_POLICY": "PASSIVE",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONWARNINGS": "ignore::FutureWarning",
        }
        # Ray counts CPUs, it does not need them: one actor per node, so that all nodes can
        # keep a live link at the same time.
        count = (actors or nodes) * cpus
        resources = f"num-supernodes={nodes} client-resources-num-cpus={cpus}"
        resources += f" init-args-num-cpus={count}"
        with _superlink(runtime, control, environment):
            command = ["flwr", "run", str(app), "--stream", "--federation-config", resources]
            command += ["-c", run_config] if run_config else []
            subprocess.run(command, env=environment, check=True)
            return _last_run(environment)


def _last_run(environment: dict[str, str]) -> dict[str, Any]:
    """Ask Flower for the run; its log may end a moment before its status is final."""
    run: dict[str, Any] = {}
    for _ in range(60):
        listing = subprocess.run(
            ["flwr", "ls", "--format", "json"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        run = json.loads(listing.stdout)["runs"][0]
        if run["status"].startswith("finished"):
            break
        time.sleep(0.5)
    return run


@contextmanager
def _superlink(runtime: int, control: int, environment: dict[str, str]) -> Iterator[None]:
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--control-api-address", f"127.0.0.1:{control}"]
    command += ["--host", "127.0.0.1", "--port", str(runtime)]
    log = Path(environment["FLWR_HOME"]) / "superlink.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            wait_until_healthy(process, runtime, log)
            yield
        finally:
            _stop(process, environment["FLWR_HOME"])


def wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, log: Path, ca: str | None = None
) -> None:
    """Wait for a SuperLink's HTTP API.

    Raises
    ------
    RuntimeError
        It ended, or did not answer within a minute; the text has the end of its log.
    """
    trust = ssl.create_default_context(cafile=ca) if ca else None
    url = f"{'https' if ca else 'http'}://127.0.0.1:{port}/health"
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(url, timeout=1, context=trust):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the SuperLink did not start:\n{log.read_text()[-2000:]}")


def _stop(process: subprocess.Popen[bytes], home: str) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stop_processes(home)


def stop_processes(home: str) -> None:
    """Wait for what Flower started with an FLWR_HOME, and end what does not end by itself.

    Flower's workers and Ray's daemons have sessions of their own; all of them inherit
    FLWR_HOME, which no process of another run has.
    """
    deadline = time.monotonic() + STOP_TIMEOUT
    while (left := _processes_of(home)) and time.monotonic() < deadline:
        if time.monotonic() > deadline - STOP_TIMEOUT / 2:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def _processes_of(home: str) -> list[int]:
    marker = f"FLWR_HOME={home}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if marker in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


if __name__ == "__main__":
    sys.exit(main())
