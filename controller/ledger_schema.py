"""What the ledger's rows hold, and how they are chained."""

from __future__ import annotations

import base64
import enum
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.membership import Membership
from controller.observation import StepObservation
from protos.types import Cursors, Generation, Lane, Mixture, Plan, Quarantine, Rank, Step

SCHEMA_VERSION = 2
"""Stored in the file. Older ones are brought up to it when they are opened to be written, and read
as they are; newer ones are refused. 1: of release 0.1.0. 2: `head.epoch`, anchors."""

OLDEST_VERSION = 1

CARRY_EVERY = 256
"""Steps between snapshots of the carry: so many steps at most to compute the carry at any step."""

GENESIS = bytes(32)
"""What stands for the hash before the first row."""

CREATE = """
CREATE TABLE ledger (
    seq INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    step INTEGER NOT NULL,
    time_s REAL NOT NULL,
    body TEXT NOT NULL,
    data BLOB,
    prev_hash BLOB NOT NULL,
    hash BLOB NOT NULL
);
CREATE INDEX ledger_kind_step ON ledger (kind, step, seq);
CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 0), seq INTEGER NOT NULL, hash BLOB NOT NULL);
INSERT INTO head VALUES (0, 0, zeroblob(32));
"""
"""Version 1; `UPGRADES` bring it to the newest."""

UPGRADES = {2: "ALTER TABLE head ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;"}
"""What is to be done on the way to a version, from the one before it."""

CREATE_NEWEST = "CREATE INDEX IF NOT EXISTS ledger_kind_seq ON ledger (kind, seq)"
"""The newest rows of a kind, however many there are."""


class Kind(enum.Enum):
    """What a row records."""

    RUN = "run"  # the run's settings, anew at each start of a controller
    GENERATION = "generation"  # a membership of ranks begins at `step`
    FORK = "fork"  # it begins before steps that were trained already
    PLAN = "plan"  # a mixture that holds from `step` on
    AMEND = "amend"  # workers went on with an older plan from `step` on than the ledger has there
    SEAL = "seal"  # the plans of all steps up to `step` are final
    STEP = "step"  # what the ranks reported of `step`, and what was decided
    SHADOW = "shadow"  # what shadow policies proposed after `step`
    SKIP = "skip"  # nothing was heard of the steps up to `step`
    CURSORS = "cursors"  # lanes' places after `step`
    CONTROL = "control"  # an operator took the decision from the policy, or gave it back
    WORKERS = "workers"  # so many loader workers are wanted
    SNAPSHOT = "snapshot"  # the policy's state after `step` was saved
    QUARANTINE = "quarantine"  # something is left out of the data
    EVENT = "event"  # anything else that happened
    PRUNE = "prune"  # rows of old steps were dropped: anchors hold the chain together there
    ANCHOR = "anchor"  # stands where rows were dropped; never written as a row of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row to be written."""

    kind: Kind
    step: int
    """-1: of no step."""

    body: Mapping[str, Any]
    """JSON values; no NaN."""

    data: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row as it was written."""

    seq: int
    kind: Kind
    step: int
    time_s: float
    body: Mapping[str, Any]
    data: bytes | None


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepRecord:
    """A step as the ledger has it."""

    observation: StepObservation
    to_policy: bool
    """The policy observed it, and proposed for `proposed_step`."""

    proposed_step: Step


def encode_body(body: Mapping[str, Any]) -> str:
    """Return the one JSON text of `body`; floats come back as they were."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def row_hash(
    *,
    prev_hash: bytes,
    seq: int,
    kind: str,
    step: int,
    time_s: float,
    body: str,
    data: bytes | None,
) -> bytes:
    """Return the hash that chains a row to the one before it."""
    digest = hashlib.sha256(prev_hash)
    # The lengths keep a byte from moving between fields unnoticed.
    encoded = body.encode()
    lengths = f"{len(encoded)}|{-1 if data is None else len(data)}"
    digest.update(f"|{seq}|{kind}|{step}|{time_s!r}|{lengths}|".encode())
    digest.update(encoded)
    digest.update(data or b"")
    return digest.digest()


def plan_entry(plan: Plan, *, reason: str) -> Entry:
    """Record a plan."""
    body = {
        "version": plan.version,
        "shares_q32": list(plan.mixture.shares_q32),
        "carry_q32": list(plan.carry_q32),
        "reason": reason,
    }
    return Entry(kind=Kind.PLAN, step=plan.first_step, body=body)


def plan_of(row: Row) -> Plan:
    """Return the plan that a row records."""
    return Plan(
        version=row.body["version"],
        first_step=Step(row.step),
        mixture=Mixture(tuple(row.body["shares_q32"])),
        carry_q32=tuple(row.body["carry_q32"]),
    )


def seal_entry(
    through: int, *, observed_through: int, carry_after: NDArray[np.int64] | None
) -> Entry:
    """Record a seal, and through which step it was decided.

    `carry_after` is the carry into the step after it.
    """
    body: dict[str, Any] = {"observed_through": observed_through}
    if carry_after is not None:
        body["carry_q32"] = carry_after.tolist()
    return Entry(kind=Kind.SEAL, step=through, body=body)


def cursors_entry(step: Step, cursors: Cursors, generation: Generation) -> Entry:
    """Record lanes' places after `step`."""
    lanes, data = _packed_cursors(cursors)
    body = {"generation": generation, "lanes": lanes}
    return Entry(kind=Kind.CURSORS, step=step, body=body, data=data)


def cursors_of(row: Row) -> Cursors:
    """Return the lanes' places that a row records."""
    lanes = row.body["lanes"]
    raw = np.frombuffer(zlib.decompress(row.data or b""), dtype="<u4")
    places = raw.astype(np.uint32).reshape(len(lanes), -1, 3)
    return {Lane(lane): places[index] for index, lane in enumerate(lanes)}


def _packed_cursors(cursors: Cursors) -> tuple[list[int], bytes]:
    lanes = sorted(cursors)
    places = np.stack([cursors[lane] for lane in lanes]).astype("<u4", copy=False)
    return list(lanes), zlib.compress(places.tobytes(), level=1)


def membership_entry(membership: Membership) -> Entry:
    """Record that a generation begins."""
    lanes, data = _packed_cursors(membership.cursors)
    body = {
        "generation": membership.generation,
        "world_size": membership.world_size,
        "attempt_ids": {str(rank): name for rank, name in membership.attempt_ids.items()},
        "lanes": lanes,
        "cursor_steps": [membership.cursor_steps[Lane(lane)] for lane in lanes],
    }
    return Entry(kind=Kind.GENERATION, step=membership.first_step, body=body, data=data)


def fork_entry(membership: Membership, trained_through: int) -> Entry:
    """Record that a generation begins before steps that were trained: those are superseded."""
    return Entry(
        kind=Kind.FORK,
        step=membership.first_step,
        body={"generation": membership.generation, "trained_through": trained_through},
    )


def membership_of(row: Row) -> Membership:
    """Return the generation that a row records."""
    body = row.body
    return Membership(
        generation=Generation(body["generation"]),
        world_size=body["world_size"],
        first_step=Step(row.step),
        attempt_ids={Rank(int(rank)): name for rank, name in body["attempt_ids"].items()},
        cursors=cursors_of(row),
        cursor_steps={
            Lane(lane): Step(step)
            for lane, step in zip(body["lanes"], body["cursor_steps"], strict=True)
        },
    )


_OPTIONAL_FLOATS = ("validation_loss", "excess_sum", "part_square_norms")
"""[domains] each; left out where not measured."""


def observation_body(observation: StepObservation) -> dict[str, Any]:
    """Return an observation as JSON values that give back the very same numbers."""
    alignment = observation.alignment
    return {
        "num_steps": observation.num_steps,
        "planned": observation.planned.tolist(),
        "sequences": observation.sequences.tolist(),
        "tokens": observation.tokens.tolist(),
        "loss_sum": observation.loss_sum.tolist(),
        "alignment": None if alignment is None else _packed(alignment),
        "weight_norms": observation.weight_norms.tolist(),
        "update_norms": observation.update_norms.tolist(),
        "missing_ranks": observation.num_missing_ranks,
        **{
            name: getattr(observation, name).tolist()
            for name in (*_OPTIONAL_FLOATS, "num_parts")
            if getattr(observation, name) is not None
        },
    }


def step_record_of(row: Row) -> StepRecord:
    """Return the step that a row records."""
    body = row.body
    seen = body["observation"]
    num_domains = len(seen["planned"])
    alignment = seen["alignment"]
    return StepRecord(
        observation=StepObservation(
            step=Step(row.step),
            num_steps=seen["num_steps"],
            planned=_floats(seen["planned"]),
            sequences=np.asarray(seen["sequences"], dtype=np.int64),
            tokens=np.asarray(seen["tokens"], dtype=np.int64),
            loss_sum=_floats(seen["loss_sum"]),
            alignment=None if alignment is None else _unpacked(alignment, num_domains),
            weight_norms=_floats(seen["weight_norms"]),
            update_norms=_floats(seen["update_norms"]),
            num_missing_ranks=seen["missing_ranks"],
            num_parts=np.asarray(seen["num_parts"], np.int64) if "num_parts" in seen else None,
            **{name: _floats(seen[name]) for name in _OPTIONAL_FLOATS if name in seen},
        ),
        to_policy=body["to_policy"],
        proposed_step=Step(body["proposed_step"]),
    )


def quarantine_entry(quarantine: Quarantine, *, worker_id: str) -> Entry:
    """Record something that is left out of the data."""
    body = {
        "domain": quarantine.domain,
        "shard": quarantine.shard,
        "sample": quarantine.sample,
        "reason": quarantine.reason,
        "worker": worker_id,
    }
    return Entry(kind=Kind.QUARANTINE, step=-1, body=body)


def quarantine_of(row: Row) -> Quarantine:
    """Return the quarantine that a row records."""
    return Quarantine(
        domain=row.body["domain"],
        shard=row.body["shard"],
        sample=row.body["sample"],
        reason=row.body["reason"],
    )


def event_entry(name: str, step: int = -1, **details: object) -> Entry:
    """Record something that happened."""
    return Entry(kind=Kind.EVENT, step=step, body={"event": name, **details})


def workers_entry(wanted: int) -> Entry:
    """Record how many loader workers are wanted."""
    return Entry(kind=Kind.WORKERS, step=-1, body={"wanted": wanted})


def _floats(values: list[float]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _packed(matrix: NDArray[np.float64]) -> str:
    return base64.b64encode(matrix.astype("<f8", copy=False).tobytes()).decode()


def _unpacked(text: str, num_domains: int) -> NDArray[np.float64]:
    raw = np.frombuffer(base64.b64decode(text), dtype="<f8")
    return raw.reshape(num_domains, num_domains).astype(np.float64)
