"""The relay's folder of a run: what was configured, and what happened."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from flwr_clicooper.errors import OptionError
from flwr_clicooper.files import write_atomically

RUN_FILE = "run.toml"
METRICS_FILE = "metrics.jsonl"
PRIVACY_FILE = "privacy.json"
FILES = (RUN_FILE, METRICS_FILE, PRIVACY_FILE)
_PACKAGES = ("flwr", "flwr-clicooper", "numpy", "safetensors", "torch")


class RunFolder:
    """``run.toml``, ``metrics.jsonl`` and ``privacy.json`` of one run.

    Parameters
    ----------
    path : Path
        The run's folder; made if it does not exist.
    run_id : int
        Flower's run ID.
    options : mapping
        The resolved options.

    Raises
    ------
    OptionError
        The folder holds a run already.
    """

    def __init__(self, path: Path, run_id: int, options: Mapping[str, Any]) -> None:
        self.path = path
        if (path / RUN_FILE).exists():
            raise OptionError(
                f"{path} holds a run already; a LocalGrid serves one run, so make a new one"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._record: dict[str, Any] = {
            "run": {"id": str(run_id), "status": "running", "started": _now()},
            "options": dict(options),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in _PACKAGES},
            },
        }
        self._write()
        self._metrics = (path / METRICS_FILE).open("a", encoding="utf-8", buffering=1)

    def note(self, kind: str, **values: Any) -> None:
        """Append one line to the metrics."""
        self._metrics.write(json.dumps({"time": _now(), "kind": kind, **values}) + "\n")

    def parties(self, names: Mapping[str, Any]) -> None:
        """Write down who takes part."""
        self._record["parties"] = dict(names)
        self._write()

    def write_privacy(self, statement: Mapping[str, Any]) -> None:
        """Write the privacy statement."""
        text = json.dumps(dict(statement), indent=2)
        write_atomically(self.path / PRIVACY_FILE, text.encode() + b"\n")

    def close(self, status: str, **values: Any) -> None:
        """Write how the run ended."""
        self._record["run"] |= {"status": status, "finished": _now(), **values}
        self._write()
        self._metrics.close()

    def _write(self) -> None:
        write_atomically(self.path / RUN_FILE, tomli_w.dumps(self._record).encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
