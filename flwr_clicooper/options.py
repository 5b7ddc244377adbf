"""Run options: parsed and validated in one place.

Every option is a flat key of ``[tool.flwr.app.config]``. Keys under the table
``task`` (``task.lr = 0.1``) belong to the user's own task and are not checked.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flwr_clicooper.contradictions import CONTRADICTIONS
from flwr_clicooper.errors import OptionError

TASK_PREFIX = "task."
_REQUIRED = "(required)"
_HEADS = ("public", "random", "private")


@dataclass(frozen=True)
class Rule:
    """What one option accepts: a sentence for people and a check that agrees with it."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) or _is_int(value)) and math.isfinite(value)


def _is_place(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    host, _, port = value.rpartition(":")
    return not value or (bool(host) and port.isdecimal() and int(port) <= 65535)


def _choice(*names: str) -> Rule:
    return Rule("one of " + ", ".join(repr(n) for n in names), lambda v: v in names)


_COUNT = Rule("an integer >= 1", lambda v: _is_int(v) and v >= 1)
_SEED = Rule("an integer from 0 to 2**63 - 1", lambda v: _is_int(v) and 0 <= v < 2**63)
_FLAG = Rule("true or false", lambda v: isinstance(v, bool))
_POSITIVE = Rule("a number > 0", lambda v: _is_number(v) and v > 0)
_NOT_NEGATIVE = Rule("a number >= 0", lambda v: _is_number(v) and v >= 0)
_PROBABILITY = Rule("a number between 0 and 1", lambda v: _is_number(v) and 0 < v < 1)
_PATH = Rule("a path", lambda v: isinstance(v, str) and bool(v))
_OPTIONAL_PATH = Rule("a path, or empty for none", lambda v: isinstance(v, str))


def _option(default: Any, rule: Rule, unit: str, meaning: str) -> Any:
    metadata = {"rule": rule, "unit": unit, "meaning": meaning}
    if default is _REQUIRED:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """The options of a run.

    Attributes carry the option's name with underscores; ``Options.table()`` lists
    every key with its default, unit and meaning.
    """

    release: str = _option(
        _REQUIRED,
        _choice("clean", "local-dp", "central-dp", "interactive"),
        "",
        "what the owner sends: its training activations once as they are (`clean`) or "
        "clipped and with noise (`local-dp`), synthetic ones instead (`central-dp`), or a "
        "fresh activation per step with the gradient coming back (`interactive`)",
    )
    epsilon: float = _option(
        0.0,
        _NOT_NEGATIVE,
        "",
        "privacy of the activations of one `privacy-unit`, over the whole run; 0 for none",
    )
    delta: float = _option(
        1e-5, _PROBABILITY, "", "probability with which epsilon may not hold"
    )
    clip: float = _option(
        1.0, _POSITIVE, "", "bound of an activation's L2 norm (`record`) or of each element"
    )
    privacy_unit: str = _option(
        "record",
        _choice("record", "element"),
        "",
        "what epsilon protects: a whole record, or one coordinate of its activation",
    )
    head: str = _option(
        "",
        Rule("'public', 'random' or 'private'", lambda v: v in ("", *_HEADS)),
        "",
        "where the head's weights come from; a release with epsilon needs to know",
    )
    class_scores: int = _option(
        0,
        Rule("an integer >= 2, or 0", lambda v: _is_int(v) and v >= 0 and v != 1),
        "classes",
        "in `local-dp`: half of the budget fits a classifier of the head's features, and what "
        "leaves of a record is its noisy score of each class; 0: its activation",
    )
    label_expansion: int = _option(
        0,
        Rule("an integer >= 0", lambda v: _is_int(v) and v >= 0),
        "",
        "pseudo-classes per class, assigned by the owner's secret key; the model needs as "
        "many outputs. 0: labels keep their names",
    )
    label_epsilon: float = _option(
        0.0, _NOT_NEGATIVE, "", "privacy of one label, by randomised response; 0 for none"
    )
    num_rounds: int = _option(5, _COUNT, "epochs", "rounds; one round is one epoch")
    batch_size: int = _option(256, _COUNT, "records", "records per optimizer step")
    microbatches: int = _option(1, _COUNT, "", "parts of a batch that are in flight together")
    schedule: str = _option(
        "lockstep",
        _choice("lockstep", "local"),
        "",
        "exact end-to-end training, or each trainer by itself (no gradients between)",
    )
    pipeline: str = _option(
        "1f1b",
        _choice("gpipe", "1f1b"),
        "",
        "order of micro-batches at each stage; the result is the same",
    )
    label_side: str = _option(
        "trainer",
        _choice("trainer", "owner"),
        "",
        "who computes the loss: the last trainer, or the owner (U-shaped)",
    )
    learning_rate: float = _option(
        0.05, _POSITIVE, "", "of the default optimizer (SGD, momentum 0.9)"
    )
    shuffle: bool = _option(True, _FLAG, "", "a new order of the records each round")
    seal: bool = _option(
        True,
        _FLAG,
        "",
        "tensors are encrypted from party to party; the relay cannot read them",
    )
    attest: bool = _option(
        True,
        _FLAG,
        "",
        "each trainer signs what it did in each round, chained to the others' rounds; "
        "`clicooper verify` checks it",
    )
    watermark: bool = _option(
        True,
        _FLAG,
        "",
        "each trainer marks its segment with a new secret key in each round; "
        "`clicooper claim` finds the marks",
    )
    audit_every: int = _option(
        0,
        Rule("an integer >= 0", lambda v: _is_int(v) and v >= 0),
        "steps",
        "how often a trainer commits to its state within a round and keeps, on its own "
        "disk, what `clicooper audit` needs to repeat those steps; 0 for never",
    )
    relay_key: str = _option(
        "",
        _OPTIONAL_PATH,
        "",
        "identity of the relay, as `clicooper keygen` makes it; one for this run if empty",
    )
    link: str = _option(
        "live",
        _choice("live", "mailbox"),
        "",
        "how messages travel: connections that the clients open to the relay, or Flower's "
        "own messages; without a link the run goes on by mailbox",
    )
    live_address: str = _option(
        "127.0.0.1",
        Rule("a host name or IP address", lambda v: isinstance(v, str) and bool(v)),
        "",
        "where clients dial the relay; any but a loopback address makes it listen on all "
        "interfaces",
    )
    live_port: int = _option(
        0,
        Rule("an integer from 0 to 65535", lambda v: _is_int(v) and 0 <= v <= 65535),
        "",
        "port of the relay; 0 takes a free one",
    )
    live_listen: str = _option(
        "",
        Rule("`host:port`, or empty for the two above", _is_place),
        "",
        "where the relay listens if clients dial it through a forwarder or NAT",
    )
    live_insecure: bool = _option(
        False, _FLAG, "", "links without TLS: everything crosses the network in the clear"
    )
    seed: int = _option(
        0, _SEED, "", "initial weights, order of records, dropout; it is public"
    )
    timeout: float = _option(
        600.0, _POSITIVE, "seconds", "longest wait for one answer, and for the chain to form"
    )
    owner_timeout: float = _option(
        86400.0,
        _POSITIVE,
        "seconds",
        "longest wait at delivery for an owner that went offline after its release",
    )
    run_dir: str = _option("runs", _PATH, "", "folder that gets one folder per run")
    resume: str = _option(
        "",
        _OPTIONAL_PATH,
        "",
        "folder of a run that ended early; go on after its last closed round",
    )
    data_dir: str = _option(
        "", _OPTIONAL_PATH, "", "handed to `SplitTask.datasets`; a node's own wins"
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Options:
        """Parse and validate a run config.

        Parameters
        ----------
        config : Mapping[str, Any]
            Flat kebab-case keys, as in ``context.run_config``.

        Raises
        ------
        OptionError
            A key is unknown, a value is not allowed, `release` is missing, or two
            options contradict each other. The text says what is allowed.
        """
        known = {_key(f.name): f for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in config.items():
            if key.startswith(TASK_PREFIX):
                continue
            if key not in known:
                raise OptionError(_unknown(key, list(known)))
            values[known[key].name] = value
        if "release" not in values:
            raise OptionError(
                "option 'release' is missing: choose what the owner sends, "
                f"{known['release'].metadata['rule'].allowed}"
            )
        return cls(**values)

    def __post_init__(self) -> None:
        for option in fields(self):
            rule: Rule = option.metadata["rule"]
            value = getattr(self, option.name)
            if not rule.accepts(value):
                key = _key(option.name)
                raise OptionError(f"option {key!r} is {value!r}; allowed is {rule.allowed}")
        self._check_combination()

    def _check_combination(self) -> None:
        for wrong, text in CONTRADICTIONS:
            if wrong(self):
                raise OptionError(text)

    def agreed(self) -> dict[str, Any]:
        """Return the options on which relay and parties must agree."""
        local = {
            "num-rounds",
            "timeout",
            "owner-timeout",
            "run-dir",
            "data-dir",
            "link",
            "relay-key",
            "resume",
        }
        own = self.as_config().items()
        return {k: v for k, v in own if k not in local and not k.startswith("live-")}

    @property
    def private(self) -> bool:
        """Whether the owner's activations leave with a guarantee."""
        return self.epsilon > 0

    @property
    def head_trains(self) -> bool:
        """Whether the head trains, and sends fresh activations for each step.

        Otherwise the owner releases the activations of all records before training, and
        no gradient comes back to it.
        """
        return self.release == "interactive" and not self.private

    @property
    def releases_each_round(self) -> bool:
        """Whether the owner releases all records anew, with new noise, before each round."""
        return self.release == "interactive" and self.private

    def as_config(self) -> dict[str, Any]:
        """Return the options as kebab-case keys, defaults filled in."""
        return {_key(f.name): getattr(self, f.name) for f in fields(self)}

    @classmethod
    def table(cls) -> str:
        """Return every option as the Markdown table that the README shows."""
        lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
        for option in fields(cls):
            meta = option.metadata
            required = option.name == "release"
            default = "you must choose" if required else _toml(option.default)
            unit = f" ({meta['unit']})" if meta["unit"] else ""
            allowed = meta["rule"].allowed.replace("'", "`")
            lines.append(
                f"| `{_key(option.name)}` | {allowed}{unit} | {default} | {meta['meaning']} |"
            )
        return "\n".join(lines)


def node_path(node_config: Mapping[str, Any], name: str) -> Path | None:
    """Return a path of a node config; None where it is not given.

    Raises
    ------
    OptionError
        The value is not a path.
    """
    given = node_config.get(name)
    if given is None:
        return None
    if not isinstance(given, str) or not given:
        raise OptionError(f"node-config {name!r} is {given!r}; allowed is a path")
    return Path(given).expanduser()


def task_config(
    run_config: Mapping[str, Any], node_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config that a task's methods get.

    All options with their defaults, the user's ``task.*`` keys, and the node's own
    ``data-dir`` in place of the run's.

    Raises
    ------
    OptionError
        As `Options.from_config`.
    """
    config = Options.from_config(run_config).as_config()
    config.update({k: v for k, v in run_config.items() if k.startswith(TASK_PREFIX)})
    if node_config.get("data-dir"):
        config["data-dir"] = str(Path(str(node_config["data-dir"])).expanduser())
    return config


def _key(name: str) -> str:
    return name.replace("_", "-")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "none"


def _unknown(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"unknown option {key!r}: {hint}Known options are {', '.join(sorted(known))}. "
        f"Options of your own task go under the table 'task', as in {TASK_PREFIX}{key}"
    )
