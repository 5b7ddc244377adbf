"""What several commands take in: files, a task, tensors."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flwr_clicooper.errors import CooperError, EvidenceError

if TYPE_CHECKING:
    from torch import Tensor

    from flwr_clicooper.task import SplitTask


def add_files(command: argparse._ActionsContainer, name: str, what: str) -> None:
    """Add an option that takes files, any number of them and of times."""
    command.add_argument(
        name, type=Path, nargs="+", action="extend", default=[], metavar="FILE", help=what
    )


def add_task(command: argparse._ActionsContainer, *, required: bool) -> None:
    """Add the options that name a task."""
    command.add_argument(
        "--task",
        required=required,
        metavar="MODULE:NAME",
        help="your own copy of the run's SplitTask, such as my_app.task:MyTask",
    )
    command.add_argument(
        "--app-dir", type=Path, default=Path(), metavar="DIR", help="where the module is"
    )


def load_task(name: str, app_dir: Path) -> SplitTask:
    """Return the task that ``MODULE:NAME`` means: an instance, or a class without arguments.

    Raises
    ------
    CooperError
        There is no such module or name, or it is no task.
    """
    from flwr_clicooper.task import SplitTask

    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise CooperError(f"--task {name!r} is not MODULE:NAME, such as my_app.task:MyTask")
    sys.path.insert(0, str(app_dir.expanduser().absolute()))
    try:
        found = getattr(importlib.import_module(module), attribute)
        task = found() if isinstance(found, type) and issubclass(found, SplitTask) else found
    except (ImportError, AttributeError, TypeError) as error:
        raise CooperError(f"--task {name!r} cannot be loaded: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(task, SplitTask):
        raise CooperError(f"--task {name!r} is no SplitTask, but a {type(task).__name__}")
    return task


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises
    ------
    EvidenceError
        It is missing, or not a safetensors file.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise EvidenceError(f"{path} is missing or no file")
    try:
        return load_file(path)
    except Exception:  # safetensors raises many kinds
        raise EvidenceError(f"{path} is not a safetensors file") from None
