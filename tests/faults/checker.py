"""Decides from what processes wrote whether a run held its promises; needs none of them alive.

Evidence: the ranks' delivery logs and event logs, the ledger, and the shards themselves.

I2 agreement    every rank applied the same plan at a step, the one that the ledger has there,
                but for lanes of which the ledger says that they had one of their own
I3 accounting   every slot of every trained step came once, with the tokens that the shards hold
I4 durability   the ledger verifies; what an answer promised is in it
I5 idempotence  each step was closed once a generation, no report counted twice
I6 one writer   generations, plans and seals only grow, as one writer's do
I7 no silent loss  what was delivered and what is quarantined add up
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.amends import Amendments
from controller.ledger import read_rows, reading_ledger, verify
from controller.ledger_schema import Kind, Row, plan_of
from deploy.history import Delivery, read_deliveries
from deploy.record import LEDGER
from deploy.report import Findings, checks, examine
from deploy.training import RECEIVED
from protos.errors import HeadraceError
from protos.types import Plan, Step
from tests.faults.rank import EVENTS

ACCOUNTED = ("lost", "duplicated", "mismatched", "misordered", "inexact_epochs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a run left behind."""

    events: Sequence[Mapping[str, Any]]
    """Of all ranks; see `tests.faults.rank`."""

    deliveries: Sequence[Delivery]
    rows: Sequence[Row]
    """The ledger's, in the order in which they were written."""

    global_sequences: int


def read_evidence(out: Path) -> tuple[Evidence, Findings]:
    """Read a run's folder.

    Raises:
        HeadraceError: something that belongs there is missing or damaged.
    """
    with reading_ledger(out / LEDGER) as database:
        verify(database, out / LEDGER)
        rows = list(read_rows(database))
    findings = examine(out)
    domains = tuple(findings.config.data.domains)
    return (
        Evidence(
            events=list(read_events(out)),
            deliveries=read_deliveries(out / RECEIVED, domains),
            rows=rows,
            global_sequences=findings.config.batch.global_sequences,
        ),
        findings,
    )


def read_events(out: Path) -> Iterator[Mapping[str, Any]]:
    """Yield what the ranks logged; a line that a kill tore is left out."""
    for path in sorted((out / EVENTS).glob("rank*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def check(out: Path) -> list[str]:
    """Return how a run broke its promises, in words; empty: it kept them all."""
    try:
        evidence, findings = read_evidence(out)
    except HeadraceError as error:
        return [f"I4: {error}"]
    accounted = checks(findings)
    broken = [f"I3/I7: {accounted[name]} {name}" for name in ACCOUNTED if accounted[name]]
    broken += [f"I3: {fault}" for fault in accounted["faults"]]
    if not findings.obedience.plans_obeyed:
        broken.append(f"I2: steps {accounted['disobeyed_steps']} have other counts than planned")
    return [*broken, *violations(evidence)]


def violations(evidence: Evidence) -> list[str]:
    """Return what event logs and ledger say against one another."""
    return [
        *_disagreements(evidence),
        *_slots(evidence),
        *_broken_promises(evidence),
        *_counted_twice(evidence),
        *_second_writers(evidence),
    ]


def _disagreements(evidence: Evidence) -> Iterator[str]:
    applied: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for event in _of(evidence, "step"):
        versions = applied[event["generation"], event["step"]]
        versions[event["rank"]] = event["plan_version"]
    amendments = Amendments(evidence.rows)
    rows = [row for row in evidence.rows if row.kind is Kind.PLAN and amendments.holds(row)]
    plans = [plan_of(row) for row in rows]
    for (generation, step), versions in sorted(applied.items()):
        own = set(amendments.lanes_of_their_own(Step(step)).values())
        if len(set(versions.values()) - own) > 1:
            yield f"I2: ranks applied plans {versions} in generation {generation}, step {step}"
        planned = _in_force(plans, step)
        other = {r: version for r, version in versions.items() if version not in {planned, *own}}
        if other:
            yield (
                f"I2: step {step} of generation {generation} has plan {planned} in the ledger, "
                f"ranks applied {other}"
            )


def _in_force(plans: Sequence[Plan], step: int) -> int | None:
    held = [plan for plan in plans if plan.first_step <= step]
    return max(held, key=lambda plan: (plan.first_step, plan.version)).version if held else None


def _slots(evidence: Evidence) -> Iterator[str]:
    """Every slot once in each step of a generation that all its ranks ended."""
    came: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for delivery in evidence.deliveries:
        came[delivery.generation, delivery.step][delivery.slot] += 1
    ranks: dict[int, set[int]] = defaultdict(set)
    ended: dict[tuple[int, int], list[int]] = defaultdict(list)
    for event in _of(evidence, "joined"):
        ranks[event["generation"]].add(event["rank"])
    for event in _of(evidence, "step"):
        ended[event["generation"], event["step"]].append(event["rank"])
    for (generation, step), by in sorted(ended.items()):
        where = f"generation {generation}, step {step}"
        if len(by) != len(set(by)):
            yield f"I3: a rank ended {where} twice"
        slots = came[generation, step]
        doubled = sorted(slot for slot, times in slots.items() if times > 1)
        if doubled:
            yield f"I3: slots {doubled} came more than once in {where}"
        missing = set(range(evidence.global_sequences)) - set(slots)
        if missing and set(by) == ranks[generation]:
            yield f"I3: slots {sorted(missing)} never came in {where}, which all ranks ended"


def _broken_promises(evidence: Evidence) -> Iterator[str]:
    """What a rank was told of plans and seals must be in the ledger for good."""
    sealed = max((row.step for row in evidence.rows if row.kind is Kind.SEAL), default=-1)
    versions = {plan_of(row).version for row in evidence.rows if row.kind is Kind.PLAN}
    for event in _of(evidence, "answer"):
        if event["sealed_through"] > sealed:
            yield (
                f"I4: rank {event['rank']} was told of a seal through {event['sealed_through']}, "
                f"the ledger's last is {sealed}"
            )
        if event["plan_version"] not in versions:
            yield (
                f"I4: rank {event['rank']} was told of plan {event['plan_version']}, which is not "
                "in the ledger"
            )


def _counted_twice(evidence: Evidence) -> Iterator[str]:
    closed: Counter[tuple[int, int]] = Counter()
    for row in evidence.rows:
        if row.kind is not Kind.STEP:
            continue
        generation = row.body["generation"]
        closed[generation, row.step] += 1
        seen, world_size = row.body["observation"], row.body["world_size"]
        num_sequences = sum(seen["sequences"])
        if num_sequences > evidence.global_sequences:
            yield f"I5: step {row.step} counts {num_sequences} sequences: a report counted twice"
        if seen["missing_ranks"] == 0 and num_sequences != evidence.global_sequences:
            yield (
                f"I5: step {row.step} counts {num_sequences} of {evidence.global_sequences} "
                f"sequences, though all {world_size} ranks reported"
            )
    for (generation, step), times in sorted(closed.items()):
        if times > 1:
            yield f"I5: step {step} of generation {generation} was closed {times} times"


def _second_writers(evidence: Evidence) -> Iterator[str]:
    for kind, name in ((Kind.GENERATION, "generation"), (Kind.PLAN, "version")):
        numbers = [row.body[name] for row in evidence.rows if row.kind is kind]
        if any(after <= before for before, after in zip(numbers, numbers[1:], strict=False)):
            yield f"I6: {kind.value} numbers do not grow: {numbers}"
    seals = [row.step for row in evidence.rows if row.kind is Kind.SEAL]
    if any(after < before for before, after in zip(seals, seals[1:], strict=False)):
        yield "I6: a seal reaches less far than the one before it"


def _of(evidence: Evidence, name: str) -> Iterator[Mapping[str, Any]]:
    return (event for event in evidence.events if event["event"] == name)


def missing_reports(evidence: Evidence) -> int:
    """Return how many reports of closed steps never counted."""
    missing = 0
    for row in evidence.rows:
        if row.kind is Kind.STEP:
            missing += row.body["observation"]["missing_ranks"]
        elif row.kind is Kind.SKIP:
            missing += (row.step + 1 - row.body["first"]) * row.body["ranks"]
    return missing


def longest_wait_s(evidence: Evidence, *, after_step: int = 0) -> float:
    """Return for how long a rank waited for a step's data at most, in steps after `after_step`."""
    waits = [event["wait_s"] for event in _of(evidence, "step") if event["step"] > after_step]
    return max(waits, default=0.0)
