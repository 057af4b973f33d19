"""One trial: a policy, a seed, a budget of tokens, in a process of its own on one thread.

It goes through the real parts: the dataset index and the order of a run, the composer of the loader
workers, the trainer's losses and probe, the controller's sums, policy and guard, with the run's
`lag` between a report and the step that it decides. Nothing in it depends on time, so the same
trial gives the same record, whether or not it was interrupted.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from controller.aggregate import add_up
from controller.policy import artefact
from controller.prepare import prepare
from deploy.compare.checkpoint import Checkpoint, Checkpoints
from deploy.compare.compose import MEAN_FILE, POLICY_FILE, policy_of, run_config
from deploy.compare.data import open_data
from deploy.compare.learner import ComposedSteps, Learner, first_cursors, held_out_loss
from deploy.compare.model import matrix_parameters
from deploy.compare.pilot import Pilot
from deploy.compare.record import (
    Evaluation,
    Interval,
    TrialRecord,
    mean_mixture,
    trial_folder,
    write_record,
)
from deploy.compare.spec import POLICY_OF, SPEC_FILE, CompareSpec, load_spec
from deploy.compare.tally import IntervalTally, Totals
from deploy.dataset import read_index
from deploy.exits import exit_code
from deploy.failures import Stopped
from deploy.whole_file import write_whole
from loader_workers.source import WindowSource
from protos.errors import ConfigError, HeadraceError
from protos.types import Cursors, Generation, Rank, Step, StepReport
from trainer_client.delivery_log import DeliveryLog

PROGRESS_FILE = "progress.json"
WITH_PARENT = "--with-parent"
"""A trial ends when the process that started it has ended, however that was."""

_LOCK_FILE = "lock"

logger = logging.getLogger(__name__)


class Trial:
    """Runs once, from its last checkpoint if it has one."""

    def __init__(
        self,
        spec: CompareSpec,
        out: Path,
        arm: str,
        seed: int,
        *,
        delivery_log: Path | None = None,
        parent: int | None = None,
    ) -> None:
        """Build what the trial is made of.

        Args:
            spec: the comparison.
            out: its folder.
            arm: which policy.
            seed: of the weights, of the data's order and of the policy.
            delivery_log: folder for a line about each sequence trained on; None: no log.
            parent: process without which the trial is to end, too; None: it depends on no other.

        Raises:
            ConfigError: the policy's settings do not fit.
            DataError: the data, or a trial that the policy refers to, is not there.
        """
        self._spec, self._arm, self._seed = spec, arm, seed
        self._folder = trial_folder(out, arm, seed)
        self._data = open_data(spec, out)
        self._held_out = self._data.held_out(spec)
        self._policy = policy_of(spec, out, arm, seed)
        self._config = run_config(
            spec, self._data, self._folder, arm=arm, seed=seed, policy=self._policy
        )
        prepared = prepare(self._config)
        self._run = prepared.spec
        if self._run.needs_reference:
            raise ConfigError(
                f"arm {arm}: {self._policy['name']} needs a reference model, which a comparison "
                "does not train; run it by itself and compare the mixture that comes of it"
            )
        self._pilot = Pilot(prepared)
        self._learner = Learner(self._run, spec.training, model=spec.model_of(arm), seed=seed)
        self._checkpoints = Checkpoints(self._folder)
        self._next_step = 0
        self._totals = Totals.zero(self._run.num_domains)
        self._evaluations: list[Evaluation] = []
        self._intervals: list[Interval] = []
        self._cursors: Cursors = first_cursors(self._run)
        self._log_folder = delivery_log
        self._parent = parent

    def run(self) -> None:
        """Train to the end and leave the record."""
        self._folder.mkdir(parents=True, exist_ok=True)
        checkpoint = self._checkpoints.load()
        if checkpoint is not None:
            self._restore(checkpoint)
        index = read_index(self._data.index)
        with ExitStack() as stack:
            cache = stack.enter_context(self._data.cache(self._run))
            # Windows are opened where they are needed: more threads would take the other trial's
            # core, and which one opens a window changes nothing.
            source = stack.enter_context(WindowSource(self._run, index, cache, threads=1))
            deliveries = ComposedSteps(source, self._pilot.book, self._cursors)
            stack.callback(deliveries.close)
            log = self._open_log()
            if log is not None:
                stack.callback(log.close)
            stack.callback(self._learner.close)
            self._train(deliveries, log)
        self._finish()

    def _open_log(self) -> DeliveryLog | None:
        if self._log_folder is None:
            return None
        return DeliveryLog(
            self._log_folder,
            rank=Rank(0),
            generation=Generation(1),
            slots_per_lane=self._run.slots_per_lane,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._next_step = checkpoint.next_step
        self._learner.restore(checkpoint.learner)
        self._pilot.restore(checkpoint.policy, checkpoint.plans)
        self._cursors = checkpoint.cursors
        self._evaluations = checkpoint.evaluations
        self._intervals = checkpoint.intervals
        self._totals = checkpoint.totals
        self._totals.resumed_at.append(checkpoint.next_step)

    def _train(self, deliveries: ComposedSteps, log: DeliveryLog | None) -> None:
        every, last = self._spec.evaluation.every, self._spec.steps
        if self._next_step == 0:
            self._evaluate(0)
        tally = IntervalTally(self._next_step, self._run.num_domains)
        for number in range(self._next_step, last):
            if self._parent is not None and os.getppid() != self._parent:
                raise Stopped("the comparison that started this trial has ended")
            self._step(Step(number), deliveries, log, tally)
            done = number + 1
            if done % every == 0 or done == last:
                self._evaluate(done)
                self._intervals.append(tally.interval())
                tally = IntervalTally(done, self._run.num_domains)
                self._checkpoint(done)
            if done % every in (0, every // 2):
                self._tell(done)

    def _step(
        self, step: Step, deliveries: ComposedSteps, log: DeliveryLog | None, tally: IntervalTally
    ) -> None:
        began, cpu_began = time.perf_counter(), time.process_time()
        report, delivered = self._learner.train(deliveries, step)
        if log is not None:
            log.write(delivered)
        if self._run.validation_due(step):
            report = self._validated(report)
        planned = self._pilot.book.plan_at(step).mixture
        observation = add_up([report], self._run, step=step, planned=planned, world_size=1)
        self._cursors = delivered.cursors
        decision = self._pilot.decide(observation, self._cursors)
        self._totals.wall_s += time.perf_counter() - began
        self._totals.cpu_s += time.process_time() - cpu_began
        self._totals.probe_s += report.probe_s
        self._totals.add(observation, decision)
        tally.add(observation, decision)

    def _validated(self, report: StepReport) -> StepReport:
        """Add what the policy has asked for; its time counts as training's."""
        losses = self._held_out_loss(self._held_out.policy_validation)
        self._totals.policy_validations += 1
        return dataclasses.replace(report, validation_loss=losses)

    def _held_out_loss(self, tokens: NDArray[np.uint16]) -> NDArray[np.float64]:
        return held_out_loss(
            self._learner.model, tokens, micro_batch=self._spec.training.micro_batch
        )

    def _evaluate(self, done: int) -> None:
        losses = self._held_out_loss(self._held_out.test)
        self._evaluations.append(
            Evaluation(
                step=done,
                test_loss=losses.tolist(),
                wall_s=self._totals.wall_s,
                cpu_s=self._totals.cpu_s,
            )
        )

    def _checkpoint(self, done: int) -> None:
        self._checkpoints.save(
            Checkpoint(
                next_step=done,
                learner=self._learner.state(),
                policy=self._pilot.state(),
                plans=self._pilot.plans_from(Step(done)),
                cursors=self._cursors,
                evaluations=self._evaluations,
                intervals=self._intervals,
                totals=self._totals,
            )
        )

    def _tell(self, done: int) -> None:
        newest = self._evaluations[-1]
        told = {
            "step": done,
            "steps": self._spec.steps,
            "macro": float(np.mean(newest.test_loss)),
            "wall_s": self._totals.wall_s,
        }
        write_whole(self._folder / PROGRESS_FILE, json.dumps(told))

    def _finish(self) -> None:
        origin = {**self._config.origin, "steps": self._spec.steps}
        artefact.save(self._pilot.state(), self._folder / POLICY_FILE, origin=origin)
        record = self._record()
        write_whole(self._folder / MEAN_FILE, json.dumps(mean_mixture(record), indent=2) + "\n")
        write_record(record, self._folder)
        self._checkpoints.remove()

    def _validation_tokens(self) -> int:
        """Return how many labels an evaluation on the policy-validation split has."""
        return self._held_out.policy_validation[:, :, 1:].size

    def _record(self) -> TrialRecord:
        model, totals = self._learner.model, self._totals
        domains = self._run.domains
        index = read_index(self._data.index)
        sizes = np.asarray([index.text_bytes(name) for name in domains], dtype=np.float64)
        given = np.asarray(totals.given_tokens, dtype=np.float64)
        p50, p99 = np.percentile(totals.decide_ms, [50, 99]).tolist()
        return TrialRecord(
            arm=self._arm,
            seed=self._seed,
            policy=self._spec.arms[self._arm].policy,
            model=self._spec.model_of(self._arm),
            parameters=sum(each.numel() for each in model.parameters()),
            matrix_parameters=matrix_parameters(model),
            steps=self._spec.steps,
            tokens_a_step=self._run.global_sequences * self._run.sequence_length,
            domains=list(domains),
            natural=(sizes / sizes.sum()).tolist(),
            epochs=(given / np.asarray(self._data.epoch_tokens(), dtype=np.float64)).tolist(),
            evaluations=self._evaluations,
            intervals=self._intervals,
            max_share_error_sequences=totals.max_share_error_sequences,
            held_decisions=totals.held_decisions,
            guard_changes=totals.guard_changes,
            decide_ms={"p50": p50, "p99": p99},
            probe_share=totals.probe_s / max(totals.wall_s, 1e-9),
            policy_validations=totals.policy_validations,
            validation_tokens=totals.policy_validations * self._validation_tokens(),
            charged=sorted(self._spec.arms[self._arm].references()[POLICY_OF]),
            resumed_at=totals.resumed_at,
            torch_version=torch.__version__,
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the trial's lock.

    Raises:
        ConfigError: another process works on the same trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process works on the trial in {folder}: wait until it has ended"
            ) from error
        yield


def main() -> int:
    """Run the trial that the command line names: OUT ARM SEED [--with-parent]."""
    parent = os.getppid() if WITH_PARENT in sys.argv else None
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    out, arm, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        spec = load_spec(out / SPEC_FILE)
        with _alone(trial_folder(out, arm, seed)):
            Trial(spec, out, arm, seed, parent=parent).run()
    except HeadraceError as error:
        print(f"trial of {arm}, seed {seed}: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
