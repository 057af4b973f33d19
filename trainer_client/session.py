"""A rank's session with the run: batches in, reports out."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from protos.security import Security
from protos.spec import BEST_FIT, RunSpec
from protos.types import Cursors, Generation, ReportAnswer, Step, StepReport
from trainer_client.batches import Batch, StagedStep, Stager, arrive, split
from trainer_client.checkpoint import pack_state, unpack_state
from trainer_client.delivery_log import DeliveryLog
from trainer_client.probe import GradientProbe
from trainer_client.ranks import resolve_rank
from trainer_client.recorder import StepRecorder
from trainer_client.reporter import PendingReport, Reporter

if TYPE_CHECKING:
    from protos.client import ControlClient
    from trainer_client.feed import Feed
    from trainer_client.joining import Wanted


def connect(
    address: str,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    run_id: str | None = None,
    global_sequences: int | None = None,
    sequence_length: int | None = None,
    resume: Mapping[str, Any] | None = None,
    timeout_s: float = 60.0,
    delivery_log: Path | None = None,
    security: Security | None = None,
) -> Session:
    """Join the run as a data-parallel rank; returns when all ranks are there.

    Args:
        address: the controller's `host:port`.
        rank: this process; by default from torchrun's environment or torch.distributed.
        world_size: of how many.
        run_id: refuse any other run; by default HEADRACE_RUN_ID, else whichever the controller has.
        global_sequences: refuse a run with another number of sequences in a step.
        sequence_length: refuse a run with another length.
        resume: what `Session.state_dict` returned, or `merge_states` of all ranks.
        timeout_s: how long to wait for the controller, its workers and the other ranks.
        delivery_log: folder for a line about each sequence received; None: no log.
        security: the files by which to talk to controller and workers; by default those that
            HEADRACE_CA, HEADRACE_JOIN_TOKEN_FILE, HEADRACE_CERT, HEADRACE_KEY and
            HEADRACE_SERVER_NAME name.

    Raises:
        ControllerUnreachable: nobody answers at `address`.
        JoinTimeout: not all ranks came in time.
        Disagreement: ranks, or a rank and the run, differ in a setting, or `resume` is of another
            order of the data.
        NotAuthenticated: the controller does not know the token, or none was given.
        ConfigError: rank, world size, address or `resume` are wrong in themselves.
    """
    # Here and not above, so that importing trainer_client does not import grpc.
    from protos.client import ControlClient
    from trainer_client.joining import Wanted

    found_rank, found_world_size = resolve_rank(
        rank=rank, world_size=world_size, environment=os.environ
    )
    wanted = Wanted(
        rank=found_rank,
        world_size=found_world_size,
        run_id=os.environ.get("HEADRACE_RUN_ID", "") if run_id is None else run_id,
        global_sequences=global_sequences or 0,
        sequence_length=sequence_length or 0,
        timeout_s=timeout_s,
        security=security or Security.from_environment(os.environ),
    )
    control = ControlClient(address, security=wanted.security)
    try:
        return Session(control, wanted, resume=resume, delivery_log=delivery_log)
    except BaseException:
        control.close()
        raise


class Session(StepRecorder):
    """One rank's part in a run; made by `connect`, used by one thread, closed once or more."""

    def __init__(
        self,
        control: ControlClient,
        wanted: Wanted,
        *,
        resume: Mapping[str, Any] | None,
        delivery_log: Path | None,
    ) -> None:
        self._control = control
        self._wanted = wanted
        self._log_folder = delivery_log
        self._log: DeliveryLog | None = None
        self._feed: Feed | None = None
        self._stager: Stager | None = None
        self._probe: GradientProbe | None = None
        self._staged: StagedStep | None = None
        self._all_yielded = False
        self._pid = os.getpid()
        self._closed = False
        self._step_data_wait_s = 0.0
        self.data_wait_s = 0.0
        """Seconds in which training waited for data, in all."""

        self._join(resume)
        self._reporter = Reporter(self._send)
        self._step_began = time.perf_counter()
        atexit.register(self.close)

    def _join(self, resume: Mapping[str, Any] | None) -> None:
        from trainer_client.joining import join

        parsed = None if resume is None else unpack_state(resume)
        self._member = member = join(self._control, self._wanted, parsed)
        self._next_step = member.first_step
        # A cursor of an earlier step is no place before the first one, so no checkpoint has it.
        self._cursors: Cursors = {
            lane: cursor
            for lane, cursor in member.cursors.items()
            if member.cursor_steps.get(lane) == member.first_step
        }
        self._begin_recording(member.spec)

    @property
    def spec(self) -> RunSpec:
        """What all processes of the run agree on."""
        return self._member.spec

    @property
    def rank(self) -> int:
        """This data-parallel rank."""
        return self._member.rank

    @property
    def world_size(self) -> int:
        """How many data-parallel ranks there are."""
        return self._member.world_size

    @property
    def generation(self) -> Generation:
        """The membership of ranks that this session belongs to."""
        return self._member.generation

    @property
    def first_step(self) -> Step:
        """The first step that this session trains."""
        return self._member.first_step

    @property
    def reports_sent(self) -> int:
        """How many reports the controller has answered."""
        return self._reporter.num_sent

    @property
    def reports_dropped(self) -> int:
        """How many reports were lost; training goes on without them."""
        return self._reporter.num_dropped

    def probe(
        self, model: nn.Module, *, ranks: list[int] | None = None, norms: bool = True
    ) -> GradientProbe | None:
        """Watch the gradients of a few linear layers; None if the policy needs none.

        All ranks call it, after the model is on its device and before torch.compile.

        Args:
            model: plain or wrapped in DDP.
            ranks: global ranks of the data-parallel group, if they are not all ranks.
            norms: measure weight and update norms as well.

        Raises:
            ConfigError: the model has no layers that can be watched.
        """
        if self.spec.probe is None:
            return None
        if self._probe is not None:
            self._probe.close()
        self._probe = GradientProbe(
            model,
            spec=self.spec.probe,
            num_domains=self.spec.num_domains,
            world_size=self.world_size,
            ranks=ranks,
            norms=norms,
        )
        return self._probe

    def batches(
        self,
        micro_batch: int = 8,
        device: torch.device | str | None = None,
        *,
        documents: bool = False,
    ) -> Iterator[Batch]:
        """Yield the micro-batches of every step up to the run's last.

        After a step's last micro-batch comes `end_step`. Called again, it goes on with the first
        step that was not ended, from that step's first micro-batch.

        Args:
            micro_batch: sequences in a micro-batch; the last of a step may have fewer.
            device: where the tensors go; by default the CPU.
            documents: say in `Batch.documents` which document each token belongs to.

        Raises:
            WorkerUnreachable: a batch did not come within the run's `control.data_timeout_s`.
            NotReady: the same, though the workers are connected.
            StaleGeneration: another membership of ranks has begun.
        """
        self._check_process()
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        if self._stager is None:
            self._stager = self._open_feed(torch.device(device or "cpu"), documents=documents)
        self._stager.check_documents(documents)
        return self._iterate(self._stager, micro_batch)

    def _open_feed(self, device: torch.device, *, documents: bool) -> Stager:
        from trainer_client.feed import Feed

        if self._log_folder is not None:
            self._log = DeliveryLog(
                self._log_folder,
                rank=self._member.rank,
                generation=self.generation,
                slots_per_lane=self.spec.slots_per_lane,
            )
        # Without them the loss could not leave out what follows on a document by chance.
        needs_documents = documents or self.spec.packing == BEST_FIT
        self._feed = Feed(self._member, self._control, documents=needs_documents)
        self._step_began = time.perf_counter()
        return Stager(self._feed, device, spec=self.spec, documents=documents)

    def _iterate(self, stager: Stager, micro_batch: int) -> Iterator[Batch]:
        most_sequences = -(-self.spec.global_sequences // self.world_size)
        while self._next_step < self.spec.num_steps:
            staged = self._begin_step(stager)
            for batch in split(staged, micro_batch=micro_batch, most_sequences=most_sequences):
                self._all_yielded = batch.last_of_step
                if batch.last_of_step and self._next_step + 1 < self.spec.num_steps:
                    stager.look_ahead(Step(self._next_step + 1))
                if self._probe is not None:
                    self._probe.begin(batch)
                yield batch
            if self._staged is staged:
                raise ValueError(
                    f"end_step() was not called after the last micro-batch of step "
                    f"{self._next_step}: call it where batch.last_of_step is true"
                )

    def _begin_step(self, stager: Stager) -> StagedStep:
        self._forget_recorded()
        if self._staged is None:
            began = time.perf_counter()
            self._staged = stager.get(self._next_step)
            self._step_data_wait_s = time.perf_counter() - began
            self.data_wait_s += self._step_data_wait_s
            arrive(self._staged)
            if self._log is not None:
                self._log.write(self._staged.delivered)
        return self._staged

    def end_step(self, *, loss_scale: float = 1.0) -> None:
        """Say that the optimizer's step is done; the report leaves in the background.

        Args:
            loss_scale: what the trainer multiplied `loss`'s result by, e.g. a GradScaler's scale.

        Raises:
            ValueError: the step has micro-batches left, or was ended already.
        """
        self._check_process()
        staged = self._staged
        if staged is None or not self._all_yielded:
            raise ValueError(
                f"end_step() came before the last micro-batch of step {self._next_step}: call it "
                "once, where batch.last_of_step is true"
            )
        probe = None
        if self._probe is not None:
            probe = self._probe.finish(self._next_step, loss_scale=loss_scale * self._loss_scale())
        losses = self._losses.finish()
        report = self._report(staged)
        self._reporter.offer(
            PendingReport(report=report, losses=losses, probe=probe, inputs=self._inputs.finish())
        )
        self._cursors = staged.delivered.cursors
        self._next_step = Step(self._next_step + 1)
        self._staged, self._all_yielded = None, False

    def _send(self, reports: Sequence[StepReport], timeout_s: float) -> ReportAnswer:
        """Send reports, on the reporter's thread, and follow lanes that have moved since."""
        answer = self._control.report_steps(reports, timeout_s=timeout_s)
        if self._feed is not None:
            self._feed.hear_lanes(answer.lanes_version)
        return answer

    def _report(self, staged: StagedStep) -> StepReport:
        now = time.perf_counter()
        step_s, self._step_began = now - self._step_began, now
        delivered = staged.delivered
        num_domains = self.spec.num_domains
        return StepReport(
            generation=self.generation,
            rank=self._member.rank,
            step=self._next_step,
            plan_version=delivered.plan_version,
            sequences=np.bincount(delivered.domain_ids, minlength=num_domains),
            tokens=np.zeros(num_domains, np.int64),
            loss_sum=np.zeros(num_domains),
            step_s=step_s,
            data_wait_s=self._step_data_wait_s,
            degraded=delivered.degraded,
            cursors=delivered.cursors,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's place in the data after the last `end_step`; plain types only."""
        return pack_state(
            run_id=self.spec.run_id,
            order_sha256=self.spec.order_sha256(),
            step=self._next_step,
            world_size=self.world_size,
            cursors=self._cursors,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Join anew from a state, as `connect(resume=state)` does; all ranks must do so.

        Raises:
            ValueError: batches were taken already.
            HeadraceError: see `connect`.
        """
        if self._feed is not None:
            raise ValueError(
                "load_state_dict() came after batches(): load the state first, or connect() anew"
            )
        self._join(state)

    def close(self) -> None:
        """Send what reports are left, for a few seconds at most, and end; may be called twice."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._feed is not None:
            self._feed.close()
        self._reporter.close()
        self._control.close()
        if self._probe is not None:
            self._probe.close()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_process(self) -> None:
        if self._closed:
            raise ValueError("the session is closed: connect() again")
        if os.getpid() != self._pid:
            raise ValueError(
                f"this session belongs to process {self._pid}, not to its fork {os.getpid()}: use "
                "it in the training process only, outside DataLoader workers"
            )
