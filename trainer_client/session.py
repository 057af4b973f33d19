"""A rank's session with the run: batches in, reports out."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
import torch
from torch import nn

from protos.spec import BEST_FIT, RunSpec
from protos.types import Cursors, Generation, ReportAnswer, Step, StepReport
from trainer_client.batches import Batch, Stager
from trainer_client.checkpoint import ledger_head_of, pack_state, unpack_state
from trainer_client.delivery_log import DeliveryLog
from trainer_client.peers import Peers
from trainer_client.probe import GradientProbe
from trainer_client.recorder import StepRecorder
from trainer_client.reporter import PendingReport, Reporter
from trainer_client.step_log import LogFn, step_log
from trainer_client.taken import TakenStep, TakenSteps, most_sequences

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from protos.client import ControlClient
    from trainer_client.feed import Feed
    from trainer_client.joining import Wanted
    from trainer_client.shared_feed import SharedFeed

logger = logging.getLogger(__name__)


class Session(StepRecorder):
    """One rank's part in a run; made by `connect`, used by one thread, closed once or more."""

    def __init__(
        self,
        control: ControlClient,
        wanted: Wanted,
        *,
        resume: Mapping[str, Any] | None,
        delivery_log: Path | None,
        peers: Peers | None = None,
        data_ranks: list[int] | None = None,
        log_fn: LogFn | None = None,
    ) -> None:
        self._control = control
        self._peers = peers
        self._data_ranks = data_ranks
        self._wanted = wanted
        self._log_folder = delivery_log
        self._log: DeliveryLog | None = None
        self._feed: Feed | SharedFeed | None = None
        self._taken: TakenSteps | None = None
        self._probe: GradientProbe | None = None
        self._warned_of_no_losses = False
        self._ledger_head = ""
        self._pid = os.getpid()
        self._closed = False
        self._join(resume)
        self._reporter = Reporter(self._send, heard=step_log(log_fn, self.spec.domains))
        self._step_began = time.perf_counter()
        atexit.register(self.close)

    def _join(self, resume: Mapping[str, Any] | None) -> None:
        from trainer_client.joining import join

        parsed = None
        if resume is not None:
            parsed = unpack_state(resume)
            self._ledger_head = ledger_head_of(resume)
        if self._peers is None:
            self._member = join(self._control, self._wanted, parsed)
        else:
            from trainer_client.shared_feed import join_together

            self._member = join_together(
                self._peers, self._wanted, lambda: join(self._control, self._wanted, parsed)
            )
        member = self._member
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
    def _leads(self) -> bool:
        """Tell whether this rank reads and reports for those that share its rows."""
        return self._peers is None or self._peers.leads

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
    def data_wait_s(self) -> float:
        """Seconds in which training waited for data, in all."""
        return 0.0 if self._taken is None else self._taken.data_wait_s

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
            model: plain, tensor-parallel, or wrapped in DDP or FSDP2.
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
            ranks=self._data_ranks if ranks is None else ranks,
            norms=norms,
        )
        return self._probe

    def batches(
        self,
        micro_batch: int = 8,
        device: torch.device | str | None = None,
        *,
        documents: bool = False,
        ahead: bool = False,
    ) -> Iterator[Batch]:
        """Yield the micro-batches of every step up to the run's last.

        After a step's last micro-batch comes `end_step`. Called again, it goes on with the first
        step that was not ended, from that step's first micro-batch.

        Args:
            micro_batch: sequences in a micro-batch; the last of a step may have fewer.
            device: where the tensors go; by default the CPU.
            documents: say in `Batch.documents` which document each token belongs to.
            ahead: batches may be taken before those before them are trained, also of later
                steps; then `use` must be called with each batch before the model sees it.

        Raises:
            WorkerUnreachable: a batch did not come within the run's `control.data_timeout_s`.
            NotReady: the same, though the workers are connected.
            StaleGeneration: another membership of ranks has begun.
        """
        self._check_process()
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        if self._taken is None:
            self._taken = self._open_feed(torch.device(device or "cpu"), documents=documents)
        self._taken.stager.check_documents(documents)
        batches = self._taken.batches(self._next_step, micro_batch)
        return batches if ahead else self._one_by_one(batches, self._taken)

    def loader(
        self,
        micro_batch: int = 8,
        device: torch.device | str | None = None,
        *,
        documents: bool = False,
    ) -> DataLoader[Batch]:
        """Return `batches(ahead=True)` as a DataLoader without worker processes."""
        from trainer_client.loader import make_loader

        return make_loader(self, micro_batch, device, documents=documents)

    def _open_feed(self, device: torch.device, *, documents: bool) -> TakenSteps:
        from trainer_client.feed import Feed

        if self._log_folder is not None and self._leads:
            self._log = DeliveryLog(
                self._log_folder,
                rank=self._member.rank,
                generation=self.generation,
                slots_per_lane=self.spec.slots_per_lane,
            )
        # Without them the loss could not leave out what follows on a document by chance.
        needs_documents = documents or self.spec.packing == BEST_FIT
        feed = None
        if self._leads:
            feed = Feed(self._member, self._control, documents=needs_documents)
        if self._peers is None:
            self._feed = feed
        else:
            from trainer_client.shared_feed import SharedFeed

            self._feed = SharedFeed(self._peers, feed)
        assert self._feed is not None
        self._step_began = time.perf_counter()
        return TakenSteps(
            Stager(self._feed, device, spec=self.spec, documents=documents),
            num_steps=self.spec.num_steps,
            most_sequences=most_sequences(self.spec.global_sequences, self.world_size),
            log=self._log,
            check_process=self._check_not_forked,
        )

    def _one_by_one(self, batches: Iterator[Batch], taken: TakenSteps) -> Iterator[Batch]:
        for batch in batches:
            self.use(batch)
            yield batch
            self._check_not_forked()
            if batch.last_of_step and taken.open(batch.step):
                raise ValueError(
                    f"end_step() was not called after the last micro-batch of step {batch.step}: "
                    "call it where batch.last_of_step is true"
                )

    def use(self, batch: Batch) -> None:
        """Say that the model is about to see a batch of `batches(ahead=True)`.

        Raises:
            ValueError: an earlier step has not been ended.
        """
        if batch.step != self._next_step:
            raise ValueError(
                f"a batch of step {batch.step} is used before step {self._next_step} has ended: "
                "call end_step() after the last micro-batch of each step"
            )
        if batch.first_of_step:
            self._forget_recorded()
        if self._probe is not None:
            self._probe.begin(batch)

    def end_step(self, *, loss_scale: float = 1.0) -> None:
        """Say that the optimizer's step is done; the report leaves in the background.

        Args:
            loss_scale: what the trainer multiplied `loss`'s result by, e.g. a GradScaler's scale.

        Raises:
            ValueError: the step has micro-batches left, or was ended already.
        """
        self._check_process()
        taken = None if self._taken is None else self._taken.end(self._next_step)
        if taken is None:
            raise ValueError(
                f"end_step() came before the last micro-batch of step {self._next_step}: call it "
                "once, where batch.last_of_step is true"
            )
        probe = None
        if self._probe is not None:
            probe = self._probe.finish(self._next_step, loss_scale=loss_scale * self._loss_scale())
        losses = self._losses.finish()
        if losses is None and self._leads:
            self._warn_of_no_losses()
        report = self._report(taken)
        inputs = self._inputs.finish()
        if self._leads:
            self._reporter.offer(
                PendingReport(report=report, losses=losses, probe=probe, inputs=inputs)
            )
        self._cursors = taken.staged.delivered.cursors
        self._next_step = Step(self._next_step + 1)

    def _send(self, reports: Sequence[StepReport], timeout_s: float) -> ReportAnswer:
        """Send reports, on the reporter's thread, and follow lanes that have moved since."""
        answer = self._control.report_steps(reports, timeout_s=timeout_s)
        self._ledger_head = answer.ledger_head or self._ledger_head
        if self._feed is not None:
            self._feed.hear_lanes(answer.lanes_version)
        return answer

    def _warn_of_no_losses(self) -> None:
        if not self._warned_of_no_losses:
            self._warned_of_no_losses = True
            logger.warning(
                "step %d ended without losses rank=%d: its report says 0 tokens, and a policy "
                "learns nothing from it; call session.loss() or session.record_losses() for each "
                "micro-batch (said once)",
                self._next_step,
                self.rank,
            )

    def _report(self, taken: TakenStep) -> StepReport:
        now = time.perf_counter()
        step_s, self._step_began = now - self._step_began, now
        delivered = taken.staged.delivered
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
            data_wait_s=taken.data_wait_s,
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
            ledger_head=self._ledger_head,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Join anew from a state, as `connect(resume=state)` does; all ranks must do so.

        Raises:
            ValueError: batches were taken already.
            HeadraceError: see `connect`.
        """
        self._check_process()
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

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Headrace session belongs to the process that made it and cannot be sent to another "
            "one: connect() there, or use num_workers=0 in a DataLoader that holds it"
        )

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
        self._check_not_forked()

    def _check_not_forked(self) -> None:
        if os.getpid() != self._pid:
            raise ValueError(
                f"this session belongs to process {self._pid}, not to its fork {os.getpid()}: use "
                "it in the training process only, outside DataLoader workers"
            )
