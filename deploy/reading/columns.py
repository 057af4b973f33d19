"""The rows of the ledger, taken apart into the rows of an export's tables."""

from __future__ import annotations

import base64
import datetime
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from controller.amends import Amendments
from controller.ledger_schema import Kind, Row, cursors_of, plan_of
from protos.types import SHARE_ONE

Arrays = NDArray[Any]


class Sink(Protocol):
    """What takes rows; see `TableWriter.add`."""

    def add(self, count: int, **columns: Any) -> None:
        """Append `count` rows."""


class Supersession:
    """Says which rows belong to training that was abandoned."""

    def __init__(self, forks: Iterable[Row]) -> None:
        """Take all fork rows, in the order in which they were written."""
        self._seqs: list[int] = []
        self._steps: list[int] = []
        for fork in forks:
            self._seqs.append(fork.seq)
            self._steps.append(fork.step)
        # From each fork on, the earliest step that training went back to.
        for index in reversed(range(len(self._steps) - 1)):
            self._steps[index] = min(self._steps[index], self._steps[index + 1])

    def has(self, row: Row) -> bool:
        """Say whether training went back to before the row's step after it was written."""
        later = bisect_right(self._seqs, row.seq)
        return later < len(self._steps) and self._steps[later] <= row.step


class Taker:
    """Gives each row of a ledger to the tables that are made of it."""

    def __init__(
        self,
        sinks: Mapping[str, Sink],
        domains: Sequence[str],
        supersession: Supersession,
        amendments: Amendments,
    ) -> None:
        self._sinks = sinks
        self._domains = list(domains)
        self._every = np.arange(len(domains), dtype=np.int32)
        self._supersession = supersession
        self._amendments = amendments
        self._has_domains = False
        self._takers: dict[Kind, Callable[[Row], None]] = {
            Kind.RUN: self._run,
            Kind.GENERATION: self._generation,
            Kind.STEP: self._step,
            Kind.PLAN: self._plan,
            Kind.SEAL: self._seal,
            Kind.SHADOW: self._shadow,
            Kind.QUARANTINE: self._quarantine,
            Kind.CURSORS: self._cursors,
        }

    def take(self, row: Row) -> None:
        """Take a row apart."""
        self._takers.get(row.kind, self._event)(row)

    def _add(self, table: str, count: int, **columns: Any) -> None:
        sink = self._sinks.get(table)
        if sink is not None and count:
            sink.add(count, **columns)

    def _run(self, row: Row) -> None:
        body, settings = row.body, row.body["settings"]
        self._add(
            "runs",
            1,
            **_written(row),
            run=body["run"],
            order_sha256=body["order_sha256"],
            domains=body["domains"],
            policy=settings.get("policy", {}).get("name"),
            settings=json.dumps(settings),
        )
        if not self._has_domains:
            self._has_domains = True
            sections = settings.get("data", {}).get("domains", {})
            for index, name in enumerate(self._domains):
                shards = sections.get(name, {}).get("shards", [])
                self._add("domains", 1, domain_index=index, domain=index, shards=list(shards))

    def _generation(self, row: Row) -> None:
        names = ("generation", "world_size")
        values = {name: row.body[name] for name in names}
        self._add("generations", 1, **_written(row), first_step=row.step, **values)

    def _step(self, row: Row) -> None:
        body, seen = row.body, row.body["observation"]
        number = len(self._domains)
        place = {"seq": row.seq, "step": row.step, "superseded": self._supersession.has(row)}
        sequences = np.asarray(seen["sequences"], np.int64)
        tokens = np.asarray(seen["tokens"], np.int64)
        loss_sum = np.asarray(seen["loss_sum"], np.float64)
        self._add("steps", 1, **_step_columns(row, place, sequences, tokens, loss_sum))
        self._add(
            "observations",
            number,
            **place,
            domain=self._every,
            planned_share=np.asarray(seen["planned"], np.float64),
            sequences=sequences,
            tokens=tokens,
            loss_sum=loss_sum,
            loss=np.divide(loss_sum, tokens, out=np.full(number, np.nan), where=tokens > 0),
            validation_loss=_floats(seen.get("validation_loss"), number),
            excess_sum=_floats(seen.get("excess_sum"), number),
            part_square_norms=_floats(seen.get("part_square_norms"), number),
            num_parts=np.asarray(seen.get("num_parts") or [-1] * number, np.int64),
        )
        self._decision(body, place)
        for name, value in (body.get("diagnostics") or {}).items():
            self._add("diagnostics", 1, **place, name=name, value=float(value))
        if seen["alignment"] is not None and "alignment" in self._sinks:
            raw = np.frombuffer(base64.b64decode(seen["alignment"]), "<f8")
            products = raw.reshape(number, number)
            self._add("alignment", number, **place, domain=self._every, products=products)

    def _decision(self, body: Mapping[str, Any], place: Mapping[str, Any]) -> None:
        proposal, decided = body.get("proposal"), body.get("decided_q32")
        if proposal is None and decided is None:
            return
        number = len(self._domains)
        shares = None if decided is None else np.asarray(decided, np.float64) / SHARE_ONE
        self._add(
            "decisions",
            number,
            **place,
            proposed_step=body["proposed_step"],
            domain=self._every,
            # Shares that are not finite are text in the ledger.
            proposed_share=_floats(proposal, number),
            decided_share=np.full(number, np.nan) if shares is None else shares,
        )

    def _plan(self, row: Row) -> None:
        plan, holds = plan_of(row), self._amendments.holds(row)
        shares = np.asarray(plan.mixture.shares_q32, np.int64)
        self._add(
            "plans",
            len(self._domains),
            **_written(row),
            version=plan.version,
            first_step=row.step,
            domain=self._every,
            share=shares / SHARE_ONE,
            share_q32=shares,
            carry_q32=np.asarray(plan.carry_q32, np.int64),
            reason=row.body.get("reason"),
            void=not holds,
        )

    def _seal(self, row: Row) -> None:
        observed = row.body["observed_through"]
        self._add("seals", 1, **_written(row), sealed_through=row.step, observed_through=observed)

    def _shadow(self, row: Row) -> None:
        place = {
            "seq": row.seq,
            "step": row.step,
            "superseded": self._supersession.has(row),
            "proposed_step": row.body["proposed_step"],
        }
        number = len(self._domains)
        for name, shares in row.body["proposals"].items():
            values = _floats(shares, number)
            self._add(
                "shadows",
                number,
                **place,
                shadow=name,
                domain=self._every,
                share=values,
                fault=None,
            )
        for name, fault in row.body["faults"].items():
            self._add("shadows", 1, **place, shadow=name, domain=-1, share=np.nan, fault=fault)

    def _quarantine(self, row: Row) -> None:
        body = row.body
        known = body["domain"] in self._domains
        domain = self._domains.index(body["domain"]) if known else -1
        values = {name: body.get(name) for name in ("shard", "sample", "reason", "worker")}
        self._add("quarantines", 1, **_written(row), domain=domain, **values)

    def _cursors(self, row: Row) -> None:
        superseded = self._supersession.has(row)
        for lane, places in cursors_of(row).items():
            self._add(
                "cursors",
                len(places),
                seq=row.seq,
                step=row.step,
                superseded=superseded,
                generation=row.body["generation"],
                lane=lane,
                domain=self._every,
                epoch=places[:, 0].astype(np.int64),
                window=places[:, 1].astype(np.int64),
                sequence=places[:, 2].astype(np.int64),
            )

    def _event(self, row: Row) -> None:
        body = dict(row.body)
        event = body.pop("event", None)
        self._add(
            "events",
            1,
            **_written(row),
            step=row.step,
            kind=row.kind.value,
            event=event,
            detail=json.dumps(body),
        )
        if "worker" in body:
            values = {name: body.get(name) for name in ("worker", "endpoint", "reason")}
            self._add("workers", 1, **_written(row), event=event, **values)


def _step_columns(
    row: Row, place: Mapping[str, Any], sequences: Arrays, tokens: Arrays, loss_sum: Arrays
) -> dict[str, Any]:
    body = row.body
    total = int(tokens.sum())
    return {
        **place,
        **_written(row),
        "generation": body.get("generation", -1),
        "world_size": body.get("world_size", -1),
        "missing_ranks": body["observation"]["missing_ranks"],
        "sequences": int(sequences.sum()),
        "tokens": total,
        "loss": float(loss_sum.sum()) / total if total else np.nan,
        "degraded": body.get("degraded", False),
        "observed": body["to_policy"],
        "proposed_step": body["proposed_step"],
        "policy_phase": body.get("policy_phase"),
        "reasons": body.get("reasons", []),
        "plan_versions": body.get("executed_plan_versions", []),
        **{name: body.get(name, np.nan) for name in _TIMES},
    }


_TIMES = ("step_s", "data_wait_s", "probe_s", "decision_ms")


def _written(row: Row) -> dict[str, Any]:
    return {"seq": row.seq, "time": datetime.datetime.fromtimestamp(row.time_s, datetime.UTC)}


def _floats(values: Sequence[Any] | None, number: int) -> NDArray[np.float64]:
    """Return values as floats, text such as `nan` too; None: of none is known."""
    if values is None:
        return np.full(number, np.nan)
    return np.asarray([float(value) for value in values], np.float64)
