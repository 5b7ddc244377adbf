"""What the owner released, on its own disk: sent again as it is, never made again.

Noise protects once. A message that must be repeated, a hand-over and a resumed run
therefore get the bytes that left before; the account says how often each chunk of records
was released, and is on the disk before the bytes leave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flwr_clicooper.chain.roles import run_folder
from flwr_clicooper.errors import PrivacyBudgetExceeded, StateError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.options import Options

ACCOUNT = "account.json"
_ORIGIN = "origin"
Stored = dict[str, Tensor]


class ReleaseStore:
    """The releases of one run, and of the runs that resume it.

    Parameters
    ----------
    folder : Path
        Made with owner-only permissions when first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, options: Options, run_id: int | str, resumed: str = "") -> ReleaseStore:
        """Return the store of a run on this machine; a resumed run goes on with its first's.

        Raises
        ------
        StateError
            The store of the run to resume is not here.
        """
        folder = run_folder(options, run_id) / "owner-release"
        if (folder / _ORIGIN).exists():
            return cls(Path((folder / _ORIGIN).read_text()))
        noisy = options.private or options.label_epsilon > 0
        if not noisy or not resumed or resumed == str(run_id):
            return cls(folder)
        first = run_folder(options, resumed) / "owner-release"
        if (first / _ORIGIN).exists():
            first = Path((first / _ORIGIN).read_text())
        if not (first / ACCOUNT).exists():
            raise StateError(
                f"{first} does not say what the run to resume has released; resume on the "
                "owner's machine and with the run-dir of the first run"
            )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(folder / _ORIGIN, str(first).encode())
        return cls(first)

    def made(self, prefix: str) -> int:
        """Return how often that was released which was released most often."""
        counts = [
            len(made) for name, made in self._account().items() if name.startswith(prefix)
        ]
        return max(counts, default=0)

    def get(
        self, name: str, release: int, allowed: int, make: Callable[[], Mapping[str, Tensor]]
    ) -> Stored:
        """Return what was released under a name, or make it, keep it and charge it.

        Parameters
        ----------
        name : str
            What is released: a chunk of the records, or all labels.
        release : int
            Which release of it; an earlier one is forgotten when a later one is made.
        allowed : int
            How often it may be released in all.
        make : callable
            Makes the tensors, with noise.

        Raises
        ------
        PrivacyBudgetExceeded
            It would be released more often than is allowed.
        StateError
            The account or what is stored is damaged.
        """
        path = self.folder / f"{name}-release-{release}.safetensors"
        account = self._account()
        charged = account.get(name, [])
        lost = not path.exists()
        if lost and len(charged) >= allowed:
            raise PrivacyBudgetExceeded(
                f"{name} of the training set: {len(charged)} of {allowed} releases are made, "
                "and what was sent is not kept any more; another one would exceed the "
                "epsilon of the run"
            )
        if lost:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(path, save({k: v.contiguous() for k, v in make().items()}))
        if lost or release not in charged:
            account[name] = [*charged, release]
            write_atomically(self.folder / ACCOUNT, json.dumps(account).encode())
        for older in self.folder.glob(f"{name}-release-*.safetensors"):
            if older != path:
                older.unlink()
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path} is missing or damaged") from error

    def forget(self) -> None:
        """Delete what was released, after delivery; the account stays."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink()

    def _account(self) -> dict[str, list[int]]:
        path = self.folder / ACCOUNT
        if not path.exists():
            return {}
        try:
            account = json.loads(path.read_text())
            return {str(name): [int(r) for r in made] for name, made in account.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise StateError(f"{path} is damaged: it is not a privacy account") from error
