"""Runs the trials of a comparison that are not finished, a few side by side."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deploy.compare.checkpoint import Checkpoints
from deploy.compare.compose import is_finished, is_ready
from deploy.compare.record import trial_folder
from deploy.compare.spec import CompareSpec
from deploy.compare.trial import PROGRESS_FILE, WITH_PARENT
from deploy.failures import Stopped, TrainerFailed
from deploy.processes import ChildProcess, StopSignals
from deploy.progress import Progress

LOG_FILE = "trial.log"
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, eq=False, slots=True)
class _Running:
    """A trial's process."""

    arm: str
    seed: int
    folder: Path
    process: ChildProcess
    began_s: float

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def done(self, num_steps: int) -> str:
        """Return which part of its steps is done, as it said last."""
        try:
            step = int(json.loads((self.folder / PROGRESS_FILE).read_text())["step"])
        except (OSError, ValueError, LookupError):
            return "0%"
        return f"{step / num_steps:.0%}"


class TrialQueue:
    """The trials of a comparison: which are finished, which run, which wait.

    A failed trial does not end the others: those that do not refer to it go on, and what failed is
    told at the end.
    """

    def __init__(
        self, spec: CompareSpec, out: Path, progress: Progress, *, only: Iterable[str] = ()
    ) -> None:
        """Look at what is there.

        Args:
            spec: the comparison.
            out: its folder.
            progress: hears what happens.
            only: arms to run; empty: all.
        """
        self._spec, self._out, self._progress = spec, out, progress
        wanted = set(only) or set(spec.arms)
        self._waiting = [
            (arm, seed)
            for arm, seed in spec.trials()
            if arm in wanted and not is_finished(out, arm, seed)
        ]
        self._running: list[_Running] = []
        self._failed: list[str] = []

    @property
    def num_waiting(self) -> int:
        """How many trials are neither finished nor begun."""
        return len(self._waiting)

    def run(self, *, jobs: int) -> None:
        """Run all that is waiting, `jobs` at a time.

        Raises:
            TrainerFailed: a trial failed; all others that could be run have been.
            Stopped: a signal came; what has been trained is in the trials' checkpoints.
        """
        with StopSignals() as stop, self._progress.going_on("trials") as update:
            try:
                while not stop.wait(_LOOK_EVERY_S) and self._look(jobs):
                    update(self._standing())
            finally:
                for trial in self._running:
                    trial.process.stop(stop)
            if stop.asked:
                raise Stopped("stopped; the same command goes on with what is not finished")
        if self._failed:
            raise TrainerFailed("; ".join(self._failed))

    def _standing(self) -> str:
        """Return how many trials wait and how far those are that run."""
        return f"{len(self._waiting)} waiting, running " + ", ".join(
            f"{trial.arm}/{trial.seed} {trial.done(self._spec.steps)}" for trial in self._running
        )

    def _look(self, jobs: int) -> bool:
        """Take note of what has ended and start more; return False when nothing is left to do."""
        for trial in list(self._running):
            status = trial.process.poll()
            if status is not None:
                self._running.remove(trial)
                self._ended(trial, status)
        for arm, seed in list(self._waiting):
            if len(self._running) < jobs and is_ready(self._spec, self._out, arm, seed):
                self._waiting.remove((arm, seed))
                self._running.append(self._start(arm, seed))
        if not self._running:
            self._failed += [
                f"{arm}, seed {seed}, was not run: a trial that it refers to is not finished"
                for arm, seed in self._waiting
            ]
        return bool(self._running)

    def _start(self, arm: str, seed: int) -> _Running:
        folder = trial_folder(self._out, arm, seed)
        how = "starts"
        step = Checkpoints(folder).newest_step()
        if step is not None:
            how = f"goes on at step {step}"
        elif (folder / LOG_FILE).exists():
            how = "starts anew: it ended before its first checkpoint"
        process = ChildProcess(
            [
                *(sys.executable, "-m", "deploy.compare.trial"),
                *(str(self._out), arm, str(seed), WITH_PARENT),
            ],
            log=folder / LOG_FILE,
            # Trials run side by side, each on one core.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        trial = _Running(arm, seed, folder, process, time.monotonic())
        self._progress.say(f"{trial}: {how}")
        return trial

    def _ended(self, trial: _Running, status: int) -> None:
        if status == 0:
            took_s = time.monotonic() - trial.began_s
            told = json.loads((trial.folder / PROGRESS_FILE).read_text())
            self._progress.say(
                f"{trial}: finished after {took_s:.0f} s, macro test loss {told['macro']:.4f} "
                f"nats; {len(self._waiting)} waiting"
            )
            return
        lines = trial.process.last_lines(1) or ["it said nothing"]
        self._failed.append(
            f"{trial}, failed (exit code {status}): {lines[0]}; see {trial.folder / LOG_FILE}"
        )
        self._progress.say(self._failed[-1])
