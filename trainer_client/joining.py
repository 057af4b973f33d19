"""How a rank becomes part of a run's generation."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from protos.client import ControlClient
from protos.errors import ConfigError, ControllerUnreachable, Disagreement
from protos.log_format import set_coordinates
from protos.retry import Retry
from protos.security import Security
from protos.slots import lanes_of, rank_slots
from protos.spec import RunSpec
from protos.types import (
    Cursors,
    Generation,
    JoinAnswer,
    JoinRequest,
    Lane,
    LaneEndpoint,
    Rank,
    Resume,
    Step,
)
from trainer_client.retry import until_answered

_RETRY = Retry(max_wait_s=3.0)
"""Join is idempotent by attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a trainer asks for; whatever it leaves open is as the run says."""

    rank: Rank
    world_size: int
    run_id: str
    global_sequences: int
    sequence_length: int
    timeout_s: float
    security: Security


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Membership:
    """A rank's place in one generation of a run."""

    rank: Rank
    world_size: int
    generation: Generation
    spec: RunSpec
    first_step: Step
    endpoints: dict[Lane, LaneEndpoint]
    cursors: Cursors
    """Of this rank's lanes; each stands before its step in `cursor_steps`."""

    cursor_steps: dict[Lane, Step]
    security: Security
    lanes_version: int = 0
    """Of `endpoints`; see `ReportAnswer.lanes_version`."""

    @property
    def slots(self) -> range:
        """The slots of a step's global batch that this rank consumes."""
        return rank_slots(
            self.rank, world_size=self.world_size, global_sequences=self.spec.global_sequences
        )

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that own those slots."""
        return lanes_of(self.slots, slots_per_lane=self.spec.slots_per_lane)


def join(control: ControlClient, wanted: Wanted, resume: Resume | None) -> Membership:
    """Wait until all ranks of the generation are there.

    Raises:
        ControllerUnreachable: nobody answers at the controller's address.
        JoinTimeout: other ranks are missing.
        Disagreement: this rank and the run, or another rank, differ in a setting.
        ConfigError: there are more ranks than sequences in a step.
    """
    if wanted.global_sequences:
        _refuse_empty_ranks(wanted.world_size, wanted.global_sequences)
    attempt_id = uuid.uuid4().hex

    def ask(left_s: float) -> JoinAnswer:
        return control.join(
            JoinRequest(
                rank=wanted.rank,
                world_size=wanted.world_size,
                attempt_id=attempt_id,
                run_id=wanted.run_id,
                global_sequences=wanted.global_sequences,
                sequence_length=wanted.sequence_length,
                resume=resume,
                timeout_s=left_s,
            )
        )

    try:
        answer = until_answered(ask, budget_s=wanted.timeout_s, retry=_RETRY, wait=time.sleep)
    except ControllerUnreachable as error:
        raise ControllerUnreachable(
            f"cannot reach the controller at {control.address} after {wanted.timeout_s:g} s: start "
            "it (headrace controller run.yaml) or check the address, the firewall and, with TLS, "
            f"the certificates ({error})"
        ) from error
    return _membership(wanted, answer)


def _refuse_empty_ranks(world_size: int, global_sequences: int) -> None:
    if world_size > global_sequences:
        raise ConfigError(
            f"{world_size} ranks cannot share the {global_sequences} sequences of a step: start at "
            f"most {global_sequences} ranks, or raise batch.global_sequences in the run file"
        )


def _membership(wanted: Wanted, answer: JoinAnswer) -> Membership:
    _refuse_empty_ranks(wanted.world_size, answer.spec.global_sequences)
    member = Membership(
        rank=wanted.rank,
        world_size=wanted.world_size,
        generation=answer.generation,
        spec=answer.spec,
        first_step=answer.first_step,
        endpoints={endpoint.lane: endpoint for endpoint in answer.endpoints},
        cursors=dict(answer.cursors),
        cursor_steps=dict(answer.cursor_steps),
        security=wanted.security,
        lanes_version=answer.lanes_version,
    )
    for lane in member.lanes:
        if lane not in member.endpoints or lane not in member.cursors:
            raise Disagreement(
                f"the controller's answer to rank {wanted.rank} of {wanted.world_size} has no "
                f"endpoint or no cursor for lane {lane}: controller and trainer must be of one "
                "version of Headrace"
            )
    set_coordinates(run=member.spec.run_id, rank=member.rank)
    return member
