"""The relay: it forms the chain, drives training, and brings the model home."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from logging import ERROR, INFO
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flwr_clicooper.chain.checkpoint import Checkpoint
from flwr_clicooper.chain.linking import link_up
from flwr_clicooper.chain.notary import Notary
from flwr_clicooper.chain.phases import ChainRun
from flwr_clicooper.chain.progress import size
from flwr_clicooper.chain.recovery import Recovery
from flwr_clicooper.chain.roles import run_folder
from flwr_clicooper.chain.roster import Roster, discover
from flwr_clicooper.chain.rundir import FILES, RunFolder
from flwr_clicooper.errors import ClientError, CooperError, OptionError
from flwr_clicooper.options import TASK_PREFIX, Options


@dataclass(repr=False)
class CooperResult(Result):
    """Flower's result, and where to find what the run made.

    Attributes
    ----------
    run_dir : Path or None
        The run's folder on the relay's machine.
    privacy : dict
        The privacy statement, as in ``privacy.json``; ``"words"`` has it in words.
    provenance : dict
        Number of signed statements and, in hex, the root of their log.
    model : str
        Path of the delivered model on the owner's machine.
    """

    run_dir: Path | None = None
    privacy: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    model: str = ""


class CooperStrategy(Strategy):
    """Client-cooperative split learning as a Flower strategy.

    Parameters
    ----------
    options : Options
        The run's options.
    task_options : mapping, optional
        The ``task.*`` keys of the run config, to be written down with the run.

    Examples
    --------
    >>> @app.main()
    ... def main(grid, context):
    ...     CooperStrategy.from_config(context.run_config).start(grid)
    ... # doctest: +SKIP
    """

    def __init__(
        self, options: Options, task_options: Mapping[str, Any] | None = None
    ) -> None:
        self.options = options
        self.task_options = dict(task_options or {})

    @classmethod
    def from_config(cls, run_config: Mapping[str, Any]) -> CooperStrategy:
        """Return the strategy that a run config describes.

        Raises
        ------
        OptionError
            An option is unknown, missing, or has a value that is not allowed.
        """
        own = {k: v for k, v in run_config.items() if k.startswith(TASK_PREFIX)}
        return cls(Options.from_config(run_config), own)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> CooperResult:
        """Train, deliver, and measure.

        Parameters
        ----------
        grid : Grid
            Flower's grid, or a `LocalGrid`.
        initial_arrays : ArrayRecord, optional
            Weights to start from, named as in a delivered model (``"1.weight"``: segment
            1's ``weight``). Segments that are not named start from the seed. The relay
            sees these weights.
        num_rounds : int, optional
            Epochs; default is the option ``num-rounds``.
        timeout : float, optional
            Seconds to wait for one answer; default is the option ``timeout``.
        train_config, evaluate_config : ConfigRecord, optional
            Must be empty: every party reads the run config.
        evaluate_fn : callable, optional
            Must be None: the relay has no model to evaluate.

        Returns
        -------
        CooperResult
            Loss per round in ``train_metrics_clientapp``, held-out accuracy after the
            last round in ``evaluate_metrics_clientapp``. ``arrays`` stays empty: the
            model belongs to the owner.

        Raises
        ------
        CooperError
            Somebody is missing, failed, or sent something wrong; the text names who and
            the way out. The run is then marked failed and no model is written.
        """
        _refuse_unused(train_config, evaluate_config, evaluate_fn)
        options = replace(
            self.options,
            num_rounds=self.options.num_rounds if num_rounds is None else num_rounds,
            timeout=self.options.timeout if timeout is None else timeout,
        )
        run_id, notary = grid.run.run_id, None
        config = options.as_config()
        folder = RunFolder(run_folder(options, run_id), run_id, config | self.task_options)
        try:
            _log_options(config | self.task_options)
            start = _starting_point(options, self.task_options, folder)
            notary = _notary(options, self.task_options, folder, start)
            roster = discover(grid, options.timeout, lambda text: log(INFO, text))
            result = self._train(grid, options, roster, folder, notary, start, initial_arrays)
        except BaseException as error:
            reason = str(error) if isinstance(error, CooperError) else type(error).__name__
            folder.close("failed", error=reason)
            if notary is not None:
                notary.close(FILES)
            log(ERROR, "the run failed: %s", reason)
            if closed := Checkpoint(folder.path).round:
                log(INFO, "To go on after round %d: resume = '%s'", closed, folder.path)
            raise
        folder.close("completed")
        if notary is not None:
            notary.close(FILES)
            result.provenance = notary.summary()
            log(INFO, "To check what was signed: clicooper verify %s", folder.path)
        return result

    def _train(
        self,
        grid: Grid,
        options: Options,
        roster: Roster,
        folder: RunFolder,
        notary: Notary | None,
        start: Checkpoint,
        initial_arrays: ArrayRecord | None,
    ) -> CooperResult:
        """Run the chain; when a party fails, go on from the last closed round."""
        result = CooperResult(run_dir=folder.path)
        recovery = Recovery(grid, roster, folder)
        while True:
            live = link_up(grid, options, roster.names())
            run = ChainRun(live or grid, options, roster, folder, notary)
            try:
                try:
                    self._run(run, start, initial_arrays, result)
                    return result
                except BaseException:
                    run.abandon()
                    raise
                finally:
                    if live is not None:
                        live.close()
            except ClientError as error:
                start = run.checkpoint if run.checkpoint.round else start
                if not recovery.goes_on(error, start.round):
                    raise

    def _run(
        self,
        run: ChainRun,
        start: Checkpoint,
        initial_arrays: ArrayRecord | None,
        result: CooperResult,
    ) -> None:
        started, rounds = time.monotonic(), run.options.num_rounds
        run.set_up(initial_arrays, start)
        once = not (self.options.head_trains or self.options.releases_each_round)
        if once and start.round < rounds:
            run.transfers.release()
        for round_ in range(start.round + 1, rounds + 1):
            if self.options.releases_each_round:
                run.transfers.release(round_)
            metrics = run.train_round(round_)
            result.train_metrics_clientapp[round_] = MetricRecord({**metrics})
        evaluation, result.model = run.deliver()
        result.privacy = run.privacy
        result.evaluate_metrics_clientapp[rounds] = MetricRecord({**evaluation})
        self._summarise(run, evaluation, result.model, time.monotonic() - started)
        run.finish()

    def summary(self) -> None:
        """Log the options of the run."""
        _log_options(self.options.as_config() | self.task_options)

    def _summarise(
        self, run: ChainRun, evaluation: Mapping[str, float], model: str, seconds: float
    ) -> None:
        traffic = run.relay.traffic
        log(INFO, "Summary")
        for name, value in evaluation.items():
            log(INFO, "\theld-out %-10s %.4f", name, value)
        log(INFO, "\ttime                %.1f s, %d messages", seconds, traffic.messages)
        for link, nbytes in traffic.link_bytes.items():
            log(INFO, "\tsent %-24s %s", link, size(nbytes))
        for party, share in run.spent.shares().items():
            text = ", ".join(f"{what} {part:.0%}" for what, part in share.items())
            log(INFO, "\ttraining, %-13s %s", party, text)
        for line in run.privacy["words"].splitlines():
            log(INFO, "\tprivacy: %s", line)
        log(INFO, "\tmodel (owner's machine) %s", model)
        log(INFO, "\trun directory           %s", run.folder.path)

    # Flower's strategies are driven by start() through these. This one drives the chain
    # itself, so nobody may call them.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used; `start` drives the chain."""
        _not_used()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not used; `start` drives the chain."""
        _not_used()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used; `start` drives the chain."""
        _not_used()

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Not used; `start` drives the chain."""
        _not_used()


def _starting_point(
    options: Options, task: Mapping[str, Any], folder: RunFolder
) -> Checkpoint:
    """Return the closed round to start from: an earlier run's, or none."""
    if not options.resume:
        return Checkpoint(folder.path)
    must_agree = options.agreed() | {"num-rounds": options.num_rounds} | dict(task)
    start = Checkpoint.of_run(options.resume, must_agree)
    log(INFO, "Resuming run %s after round %d", start.run_id, start.round)
    folder.note("resume", run=start.run_id, after=start.round)
    return start


def _notary(
    options: Options, task: Mapping[str, Any], folder: RunFolder, start: Checkpoint
) -> Notary | None:
    """Return what collects the parties' statements, if they are to make any."""
    if not options.attest:
        return None
    notary = Notary.of(folder.path, options, task)
    if start.round:
        notary.take_over(Path(options.resume).expanduser().absolute(), start.round)
    return notary


def _log_options(config: Mapping[str, Any]) -> None:
    log(INFO, "CooperStrategy:")
    for key, value in config.items():
        log(INFO, "\t%-16s %s", key, "-" if value == "" else value)


def _not_used() -> NoReturn:
    raise CooperError("CooperStrategy drives the chain itself; call start()")


def _refuse_unused(
    train_config: ConfigRecord | None,
    evaluate_config: ConfigRecord | None,
    evaluate_fn: object,
) -> None:
    if train_config or evaluate_config:
        raise OptionError(
            "train_config and evaluate_config are not used: every party reads the run "
            "config; put your options under its table 'task'"
        )
    if evaluate_fn is not None:
        raise OptionError(
            "evaluate_fn is not used: the relay has no model. The owner measures held-out "
            "accuracy on its own test set"
        )
