"""A trainer rank that only consumes, as a process of its own: `python -m tests.faults.rank`.

It writes what it saw to `OUT/ranks/rank{r}.jsonl`, one event a line, for the offline checker. Times
are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

import trainer_client
from deploy.training import RECEIVED
from deploy.whole_file import write_whole
from protos.types import Lane, ReportAnswer, StepBatch, StepReport
from trainer_client.lane_stream import LaneStream
from trainer_client.session import Session
from trainer_client.step_buffer import StepBuffer

EVENTS = "ranks"
"""Folder of the ranks' event logs, in a run's folder."""


class EventLog:
    """Appends events, each of which reaches the file before the next one happens."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        self._file: TextIO = (folder / f"rank{rank}.jsonl").open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Add an event."""
        row = {"event": event, "rank": self._rank, "time_s": time.monotonic(), **fields}
        # One write a line: threads write too, and a rank that is killed tears one line at most.
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def train(
    session: Session,
    log: EventLog,
    *,
    until: int,
    step_s: float,
    checkpoint: Callable[[int], None] = lambda step: None,
) -> None:
    """Take steps up to `until`, each of `step_s` at least; log every one of them.

    `checkpoint` is called after each, with the step that comes next.
    """
    _log_answers(session, log)
    began = time.monotonic()
    for batch in session.batches(micro_batch=64):
        fetched = time.monotonic()
        losses = (batch.labels % 7 + batch.domain_ids[:, None]).float()
        session.record_losses(losses * batch.loss_mask, batch)
        if not batch.last_of_step:
            continue
        time.sleep(max(step_s - (time.monotonic() - began), 0.0))  # what the model would take
        session.end_step()
        ended = time.monotonic()
        log.write(
            "step",
            generation=session.generation,
            step=batch.step,
            plan_version=batch.plan_version,
            degraded=batch.degraded,
            wait_s=fetched - began,
            step_s=ended - began,
        )
        began = ended
        checkpoint(batch.step + 1)
        if batch.step + 1 >= until:
            return


def _log_answers(session: Session, log: EventLog) -> None:
    """Have every answer to a report logged: what a rank was promised must be in the ledger."""
    control = session._control
    ask = control.report_steps

    def report_steps(reports: Sequence[StepReport], *, timeout_s: float = 5.0) -> ReportAnswer:
        answer = ask(reports, timeout_s=timeout_s)
        log.write(
            "answer",
            generation=reports[0].generation,
            steps=[report.step for report in reports],
            counted=answer.counted,
            plan_version=answer.plan_version,
            sealed_through=answer.sealed_through,
        )
        return answer

    control.report_steps = report_steps  # type: ignore[method-assign]


def _log_batches(log: EventLog) -> None:
    """Have every message of batches logged as it comes in: its lanes, and who sent it."""
    keep = StepBuffer.put

    def put(self: StepBuffer, batch: StepBatch, lanes: Sequence[Lane]) -> None:
        keep(self, batch, lanes)
        stream = threading.current_thread()
        assert isinstance(stream, LaneStream)
        last = batch.step + batch.num_steps - 1
        log.write("batches", endpoint=stream.endpoint, lanes=list(lanes), last_step=last)

    StepBuffer.put = put  # type: ignore[method-assign]


def main() -> int:
    """Train one generation as one rank; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--until", type=int, required=True, help="the step before which it ends")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--step-s", type=float, default=0.0, help="what a step takes at least")
    parser.add_argument("--resume", type=Path, help="a state that `--state` wrote")
    parser.add_argument(
        "--state", type=Path, help="where to write the state at the end; `{rank}` stands for it"
    )
    parser.add_argument("--state-every", type=int, default=0, help="write it after so many steps")
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--log-batches", action="store_true", help="log also what workers send")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level="INFO")
    torch.set_num_threads(1)
    log = EventLog(options.out / EVENTS, options.rank)
    fields = {"rank": options.rank}
    if options.log_batches:
        _log_batches(log)
    resume = None if options.resume is None else json.loads(options.resume.read_text())
    try:
        with trainer_client.connect(
            options.address,
            rank=options.rank,
            world_size=options.world_size,
            resume=resume,
            timeout_s=options.timeout_s,
            delivery_log=options.out / RECEIVED,
        ) as session:
            log.write("joined", generation=session.generation, first_step=session.first_step)
            state = None if options.state is None else Path(str(options.state).format(**fields))

            def checkpoint(step: int) -> None:
                if state is not None and options.state_every and step % options.state_every == 0:
                    write_whole(state, json.dumps(session.state_dict()))

            train(
                session,
                log,
                until=options.until,
                step_s=options.step_s,
                checkpoint=checkpoint,
            )
            if state is not None:
                write_whole(state, json.dumps(session.state_dict()))
        log.write("ended", sent=session.reports_sent, dropped=session.reports_dropped)
    except trainer_client.HeadraceError as error:
        log.write("failed", error=type(error).__name__, says=str(error))
        print(f"rank {options.rank}: {error}", file=sys.stderr)
        return 1
    finally:
        log.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
