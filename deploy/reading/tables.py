"""The tables of an export: names, columns, types and units; deploy/docs/reading-the-ledger.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from controller.ledger_schema import Kind

_DOMAIN = pa.dictionary(pa.int32(), pa.string())
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column; values that are missing are null."""

    name: str
    kind: Any
    """Of Arrow."""

    unit: str
    what: str
    missing: int | None = None
    """The ledger's number for a missing value, where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A folder of Parquet files of one schema."""

    name: str
    what: str
    sources: tuple[Kind, ...]
    """The ledger's rows that it is made of."""

    columns: tuple[Column, ...]
    by_default: bool = True

    @property
    def schema(self) -> Any:
        """Return the Arrow schema; each field's metadata holds its unit and description."""
        fields = [
            pa.field(
                column.name, column.kind, metadata={"unit": column.unit, "description": column.what}
            )
            for column in self.columns
        ]
        return pa.schema(fields, metadata={"description": self.what})


def _column(name: str, kind: Any, unit: str, what: str, missing: int | None = None) -> Column:
    return Column(name=name, kind=kind, unit=unit, what=what, missing=missing)


_SEQ = _column("seq", pa.int64(), "", "number of the row in the ledger")
_WHEN = _column("time", _TIME, "UTC", "when the row was written")
_STEP = _column("step", pa.int64(), "optimizer steps from 0", "which step")
_OLD = _column(
    "superseded", pa.bool_(), "", "training went back to before the step after the row was written"
)
_BY_DOMAIN = _column("domain", _DOMAIN, "", "name of the domain")
_STEP_OR_NONE = _column("step", pa.int64(), "steps", "the step that it belongs to", -1)
_AIM = _column("proposed_step", pa.int64(), "steps", "the step that was decided upon", -1)

TABLES = (
    Table(
        name="runs",
        what="a row for each start of a controller",
        sources=(Kind.RUN,),
        columns=(
            _SEQ,
            _WHEN,
            _column("run", pa.string(), "", "name of the run"),
            _column("order_sha256", pa.string(), "", "of all that the order of the data hangs on"),
            _column("domains", pa.list_(pa.string()), "", "names, in their order"),
            _column("policy", pa.string(), "", "name of the policy"),
            _column("settings", pa.string(), "JSON", "the run file as it was read"),
        ),
    ),
    Table(
        name="domains",
        what="a row for each domain, in the run's order",
        sources=(Kind.RUN,),
        columns=(
            _column("domain_index", pa.int32(), "", "position in the run's order"),
            _BY_DOMAIN,
            _column("shards", pa.list_(pa.string()), "", "paths and patterns of the run file"),
        ),
    ),
    Table(
        name="generations",
        what="a row for each membership of ranks",
        sources=(Kind.GENERATION,),
        columns=(
            _SEQ,
            _WHEN,
            _column("generation", pa.int64(), "", "its number"),
            _column("first_step", pa.int64(), "steps", "the first step that it trains"),
            _column("world_size", pa.int32(), "ranks", "how many ranks"),
        ),
    ),
    Table(
        name="steps",
        what="a row for each step that was closed",
        sources=(Kind.STEP,),
        columns=(
            _SEQ,
            _WHEN,
            _STEP,
            _OLD,
            _column("generation", pa.int64(), "", "the membership that trained it", -1),
            _column("world_size", pa.int32(), "ranks", "how many ranks it had", -1),
            _column("missing_ranks", pa.int32(), "ranks", "whose report did not come"),
            _column("sequences", pa.int64(), "sequences", "delivered"),
            _column("tokens", pa.int64(), "tokens", "labels that counted in the loss"),
            _column("loss", pa.float64(), "nats/token", "mean over those tokens"),
            _column("degraded", pa.bool_(), "", "composed without the controller's word"),
            _column("observed", pa.bool_(), "", "the policy saw it and proposed"),
            _AIM,
            _column("policy_phase", pa.string(), "", "as the policy calls it"),
            _column("reasons", pa.list_(pa.string()), "", "what changed the proposal"),
            _column("plan_versions", pa.list_(pa.int64()), "", "plans that ranks had in it"),
            _column("step_s", pa.float64(), "seconds", "of the slowest rank"),
            _column("data_wait_s", pa.float64(), "seconds", "waited for data, the slowest rank"),
            _column("probe_s", pa.float64(), "seconds", "in the gradient probe, the slowest rank"),
            _column("decision_ms", pa.float64(), "milliseconds", "from last report to decision"),
        ),
    ),
    Table(
        name="observations",
        what="a row for each step and domain: what the ranks reported",
        sources=(Kind.STEP,),
        columns=(
            _SEQ,
            _STEP,
            _OLD,
            _BY_DOMAIN,
            _column("planned_share", pa.float64(), "share", "of the plan in force"),
            _column("sequences", pa.int64(), "sequences", "delivered"),
            _column("tokens", pa.int64(), "tokens", "labels that counted in the loss"),
            _column("loss_sum", pa.float64(), "nats", "summed over those tokens"),
            _column("loss", pa.float64(), "nats/token", "their mean"),
            _column("validation_loss", pa.float64(), "nats/token", "on held-out documents"),
            _column("excess_sum", pa.float64(), "nats", "above a reference model's losses"),
            _column("part_square_norms", pa.float64(), "", "sequences' squared gradient norms"),
            _column("num_parts", pa.int64(), "sequences", "that these are summed over", -1),
        ),
    ),
    Table(
        name="decisions",
        what="a row for each decision and domain: proposed, and decided after the guard",
        sources=(Kind.STEP,),
        columns=(
            _SEQ,
            _STEP,
            _OLD,
            _AIM,
            _BY_DOMAIN,
            _column("proposed_share", pa.float64(), "share", "by the policy"),
            _column("decided_share", pa.float64(), "share", "after guard and operator"),
        ),
    ),
    Table(
        name="diagnostics",
        what="a row for each step and figure that the policy gave of itself",
        sources=(Kind.STEP,),
        columns=(
            _SEQ,
            _STEP,
            _OLD,
            _column("name", pa.string(), "", "as the policy calls it"),
            _column("value", pa.float64(), "", "the figure"),
        ),
    ),
    Table(
        name="plans",
        what="a row for each plan and domain",
        sources=(Kind.PLAN,),
        columns=(
            _SEQ,
            _WHEN,
            _column("version", pa.int64(), "", "grows by one with each plan"),
            _column("first_step", pa.int64(), "steps", "from which it holds"),
            _BY_DOMAIN,
            _column("share", pa.float64(), "share", "of the global batch"),
            _column("share_q32", pa.int64(), "2^-32", "the same, exactly"),
            _column("carry_q32", pa.int64(), "2^-32 sequences", "rounding carried into it"),
            _column("reason", pa.string(), "", "why it differs from the plan before"),
            _column("void", pa.bool_(), "", "no worker heard of it in time: another went on"),
        ),
    ),
    Table(
        name="seals",
        what="a row for each time steps became final",
        sources=(Kind.SEAL,),
        columns=(
            _SEQ,
            _WHEN,
            _column("sealed_through", pa.int64(), "steps", "the last that is final"),
            _column("observed_through", pa.int64(), "steps", "the last decided upon"),
        ),
    ),
    Table(
        name="shadows",
        what="a row for each step, shadow policy and domain; one without a domain for a fault",
        sources=(Kind.SHADOW,),
        columns=(
            _SEQ,
            _STEP,
            _OLD,
            _AIM,
            _column("shadow", pa.string(), "", "name of the shadow policy"),
            _BY_DOMAIN,
            _column("share", pa.float64(), "share", "that it would have given"),
            _column("fault", pa.string(), "", "why it proposed nothing"),
        ),
    ),
    Table(
        name="events",
        what="a row for everything else that happened",
        sources=(
            *(Kind.EVENT, Kind.FORK, Kind.SKIP, Kind.CONTROL, Kind.WORKERS),
            Kind.SNAPSHOT,
        ),
        columns=(
            _SEQ,
            _WHEN,
            _STEP_OR_NONE,
            _column("kind", pa.string(), "", "fork, skip, control, workers, snapshot or event"),
            _column("event", pa.string(), "", "what, of the kind `event`"),
            _column("detail", pa.string(), "JSON", "the rest of it"),
        ),
    ),
    Table(
        name="workers",
        what="a row for each time a loader worker came or went",
        sources=(Kind.EVENT,),
        columns=(
            _SEQ,
            _WHEN,
            _column("worker", pa.string(), "", "its id"),
            _column("event", pa.string(), "", "worker enlisted, worker left, worker lost, ..."),
            _column("endpoint", pa.string(), "", "HOST:PORT, where it is told"),
            _column("reason", pa.string(), "", "where it is told"),
        ),
    ),
    Table(
        name="quarantines",
        what="a row for everything that was left out of the data",
        sources=(Kind.QUARANTINE,),
        columns=(
            _SEQ,
            _WHEN,
            _BY_DOMAIN,
            _column("shard", pa.string(), "", "path or URL"),
            _column("sample", pa.int64(), "samples", "number in the shard; null: all of it", -1),
            _column("reason", pa.string(), "", "what was wrong"),
            _column("worker", pa.string(), "", "who found it"),
        ),
    ),
    Table(
        name="alignment",
        what="a row for each step and domain: inner products of its gradient with all domains'",
        sources=(Kind.STEP,),
        by_default=False,
        columns=(
            _SEQ,
            _STEP,
            _OLD,
            _BY_DOMAIN,
            _column("products", pa.list_(pa.float64()), "", "one for each domain, in their order"),
        ),
    ),
    Table(
        name="cursors",
        what="a row for each lane and domain that stood at a known place after a step",
        sources=(Kind.CURSORS,),
        by_default=False,
        columns=(
            _SEQ,
            _STEP,
            _OLD,
            _column("generation", pa.int64(), "", "the membership that was there"),
            _column("lane", pa.int32(), "", "which lane"),
            _BY_DOMAIN,
            _column("epoch", pa.int64(), "epochs", "of the lane's place"),
            _column("window", pa.int64(), "windows", "within the epoch"),
            _column("sequence", pa.int64(), "sequences", "within the window: the next one"),
        ),
    ),
)
