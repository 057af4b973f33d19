"""The local harness: a whole run on this machine, from its data to its report.

what             started by   ends when
Ray              harness      last of all
controller       Ray          the trainer is gone
loader workers   Ray          the trainer is gone
torchrun, ranks  harness      the run is over, fails, or is stopped; then everything else follows
"""

from __future__ import annotations

import contextlib
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from controller.config import RunConfig, load_run_file
from deploy.failures import Stopped, TrainerFailed
from deploy.history import LOG_PATTERN
from deploy.last_resort import last_resort
from deploy.local_ray import local_ray, temporary_folder
from deploy.page import with_fixed_page, with_page
from deploy.plots import draw_plots
from deploy.prepare import prepare_run
from deploy.processes import TERMINATE_GRACE_S, ChildProcess, Family, StopSignals
from deploy.progress import Progress
from deploy.report import (
    examine,
    make_report,
    print_report,
    write_report,
    write_run_digests,
)
from deploy.runfile import ADDRESS, RunOptions
from deploy.training import (
    RECEIVED,
    TRAINER_SAYS,
    Training,
    choose_training,
    keep_training,
    trainer_command,
    trainer_environment,
)
from deploy.whole_file import write_whole
from protos.client import AdminClient
from protos.errors import HeadraceError, Retryable
from protos.status import RunStatus

if TYPE_CHECKING:
    from deploy.actors import WatchedActor
    from deploy.pool import WorkerPool

TRAINER_LOG = "trainer.log"
CACHE = "cache"
LOGS = "logs"

_POLL_S = 0.5
_STATUS_TIMEOUT_S = 2.0
_STATUS_AT_LEAST_S = 0.3
"""Even when somebody is in a hurry: a controller that lives answers in much less."""

_LAST_LINES = 15
_LINES_SEARCHED = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the training went."""

    status: RunStatus | None
    """The controller's last word."""

    wall_s: float
    stopped_by: int | None
    """The signal that ended the run early."""


def run_local(options: RunOptions, console: Console) -> dict[str, Any]:
    """Make a run, from its data to its report; return what report.json holds.

    Raises:
        HeadraceError: what went wrong, in a sentence.
        Stopped: the run was ended by a signal; all that it made so far is on disk.
    """
    family = Family()
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        progress = stack.enter_context(Progress(console))
        folder = stack.enter_context(temporary_folder())
        stack.enter_context(last_resort(family, folder))
        with stop.raising():
            training = choose_training(options)
            found = _with_workers(load_run_file(prepare_run(options, progress)), options)
            config = with_page(found, options.dashboard)
            keep_training(training, options.out)
        outcome = _train(options, training, config, folder, progress, family, stop)
        with stop.raising():
            return _report(options, training, config, outcome, progress, console)


def _with_workers(config: RunConfig, options: RunOptions) -> RunConfig:
    """Return the run with the number of workers asked for, which a resume may change."""
    if options.workers is None:
        return config
    workers = config.workers.model_copy(update={"count": options.workers})
    return config.model_copy(update={"workers": workers})


def _train(
    options: RunOptions,
    training: Training,
    config: RunConfig,
    folder: Path,
    progress: Progress,
    family: Family,
    stop: StopSignals,
) -> Outcome:
    with ExitStack() as stack:
        with progress.stage("starting Ray, controller and workers"), stop.raising():
            logs = options.out / LOGS
            stack.callback(_say_logs, logs, progress)
            num_actors = 1 + config.workers.count
            ray = local_ray(folder, num_actors=num_actors, logs=logs, family=family, stop=stop)
            stack.enter_context(ray)
            # Imports Ray, which must find the environment that `local_ray` has prepared.
            from deploy.actors import start_controller, stop_actors
            from deploy.pool import WorkerPool

            config = with_fixed_page(config)
            controller, address = start_controller(config, say=progress.say)
            if config.dashboard is not None:
                progress.say(f"live page: {config.dashboard.url(config.wire_security)}")
            stack.callback(stop_actors, [controller], stop)
            write_whole(options.out / ADDRESS, address + "\n")
            stack.callback((options.out / ADDRESS).unlink, missing_ok=True)
            cache = options.out.resolve() / CACHE
            pool = WorkerPool(config, address, cache, say=progress.say)
            stack.callback(pool.stop, stop)
            pool.start()
        admin = AdminClient(address, security=config.wire_security)
        stack.callback(admin.close)
        started = time.monotonic()
        trainer = ChildProcess(
            trainer_command(options, training, config, address),
            log=options.out / TRAINER_LOG,
            env=trainer_environment(config),
        )
        watch = _Watch(admin, trainer, controller, pool, progress, stop)
        try:
            watch.until_the_end()
        finally:
            # Ranks would end where they stand in any case, and torchrun takes seconds to tell them.
            trainer.stop(stop, grace_s=0.0 if stop.asked else TERMINATE_GRACE_S)
            wall_s = time.monotonic() - started
            watch.last_status()
            progress.end_live()
        if not stop.asked and trainer.poll():
            raise TrainerFailed(_failure(trainer))
        return Outcome(status=watch.status, wall_s=wall_s, stopped_by=stop.signal)


def _say_logs(logs: Path, progress: Progress) -> None:
    if logs.is_dir():
        progress.say(f"controller or workers had something to say: see {logs}")


class _Watch:
    """Looks at everything twice a second until the trainer ends or somebody wants to stop."""

    def __init__(
        self,
        admin: AdminClient,
        trainer: ChildProcess,
        controller: WatchedActor,
        pool: WorkerPool,
        progress: Progress,
        stop: StopSignals,
    ) -> None:
        self._admin = admin
        self._trainer = trainer
        self._controller = controller
        self._pool = pool
        self._has_said_size = False
        self._progress = progress
        self._stop = stop
        self.status: RunStatus | None = None

    def until_the_end(self) -> None:
        """Return when the trainer has ended or a signal came."""
        while self._trainer.poll() is None and not self._stop.wait(_POLL_S):
            self._controller.look()
            self._pool.look()
            self._scale()
            self._ask()
            if self.status is not None:
                self._progress.show(self.status)

    def _scale(self) -> None:
        """Have as many workers as the controller was told last: by us, then by an operator."""
        if not self._has_said_size:
            # Else a wish of before the run was resumed would count.
            with contextlib.suppress(HeadraceError):
                self._admin.scale(self._pool.size, timeout_s=_STATUS_TIMEOUT_S)
                self._has_said_size = True
        elif self.status is not None and self.status.wanted_workers:
            self._pool.scale(self.status.wanted_workers)

    def last_status(self) -> None:
        """Hear the controller once more, and tell it that the run is over."""
        self._ask()
        try:
            self._admin.drain(timeout_s=self._timeout_s())
        except HeadraceError as error:
            self._progress.say(f"the controller could not be told that the run is over: {error}")

    def _ask(self) -> None:
        try:
            self.status = self._admin.status(timeout_s=self._timeout_s())
        except Retryable:
            # Its actor is watched, and training goes on without it.
            return

    def _timeout_s(self) -> float:
        return max(self._stop.patience_s(_STATUS_TIMEOUT_S), _STATUS_AT_LEAST_S)


def _failure(trainer: ChildProcess) -> str:
    """Return what the ranks said they died of, or else the end of their log."""
    ended = f"the trainer ended with exit status {trainer.poll()}"
    lines = trainer.last_lines(_LINES_SEARCHED)
    told = dict.fromkeys(line for line in lines if line.startswith(TRAINER_SAYS))
    if told:
        causes = "; ".join(line.removeprefix(TRAINER_SAYS) for line in told)
        return f"{ended}: {causes} (log: {trainer.log})"
    last = "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])
    return f"{ended}; its log is {trainer.log} and ends with:\n{last}"


def _report(
    options: RunOptions,
    training: Training,
    config: RunConfig,
    outcome: Outcome,
    progress: Progress,
    console: Console,
) -> dict[str, Any]:
    stopped = None
    if outcome.stopped_by is not None:
        stopped = f"stopped by {signal.Signals(outcome.stopped_by).name}"
        if not any((options.out / RECEIVED).glob(LOG_PATTERN)):
            raise Stopped(f"{stopped} before the first step")
    with progress.stage("checking what the trainers received"):
        findings = examine(options.out)
    report = make_report(
        findings,
        ranks=options.ranks,
        workers=config.workers.count,
        model=training.model,
        wall_s=outcome.wall_s,
        status=outcome.status,
    )
    write_report(report, options.out)
    with progress.stage("drawing plots"):
        draw_plots(findings.record, tuple(config.data.domains), options.out, title=config.run)
    if options.digest:
        write_run_digests(findings, options.out)
    print_report(report, console)
    progress.say(f"report, plots and ledger are in {options.out}")
    if stopped is not None:
        raise Stopped(f"{stopped} after {report['steps']} steps; --resume goes on")
    return report
