"""What a run came to: report.json, a short table, digests and plots, from what is on disk."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from controller.config import RunConfig, load_run_file, parse_run
from controller.history import counts_of_their_own
from controller.ledger import reading_ledger
from controller.ledger_view import LedgerView
from deploy.accounting import MAX_FAULTS_NAMED, Account, Obedience, account_for, check_plans
from deploy.dataset import open_dataset
from deploy.epochs import EpochAccount, ShardContents, account_for_epochs
from deploy.history import History, read_deliveries, trained_history, write_digests
from deploy.record import LEDGER, RunRecord, read_record
from deploy.runfile import RUN_FILE
from deploy.training import RECEIVED
from deploy.whole_file import write_whole
from protos.errors import IndexMismatch
from protos.planbook import PlanBook
from protos.slots import lane_counts
from protos.spec import RunSpec
from protos.status import RunStatus
from protos.types import Step

REPORT = "report.json"
DIGESTS = "digests.jsonl"
_EDGE_STEPS = 0.05
"""Share of the steps over which the first and last losses are averaged."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Findings:
    """A run's folder, read and checked."""

    config: RunConfig
    record: RunRecord
    history: History
    account: Account
    obedience: Obedience
    epochs: Sequence[EpochAccount]
    """The complete ones."""

    @property
    def clean(self) -> bool:
        """Everything was delivered once, as it should be, and as planned."""
        exact = all(epoch.exact for epoch in self.epochs)
        return self.account.clean and self.obedience.plans_obeyed and exact


def examine(out: Path) -> Findings:
    """Read a run's folder and hold what the trainers received against plans and shards.

    Raises:
        HeadraceError: something that belongs there is missing or damaged.
    """
    run_file, ledger = out / RUN_FILE, out / LEDGER
    if run_file.exists() or not ledger.exists():
        config, record = load_run_file(run_file), read_record(ledger)
    else:
        # `headrace run` keeps its run file; of a run by parts the ledger knows what it said.
        record = read_record(ledger)
        config = parse_run(record.settings, source=str(ledger))
    dataset = open_dataset(config)
    spec = dataset.spec
    if record.order_sha256 and not spec.has_order(record.order_sha256):
        raise IndexMismatch(
            f"the data of {out} is not what its ledger was written for: seed, domains, batch, "
            f"tokenizer or the index {config.data.index} differ; bring back those of the run"
        )
    history = trained_history(
        read_deliveries(out / RECEIVED, spec.domains), global_sequences=spec.global_sequences
    )
    contents = ShardContents(dataset)
    return Findings(
        config=config,
        record=record,
        history=history,
        account=account_for(history, contents),
        obedience=check_plans(
            history,
            record.plans,
            domains=spec.domains,
            global_sequences=spec.global_sequences,
            counts_of=_counts_of(ledger, spec),
        ),
        epochs=account_for_epochs(history, contents),
    )


def _counts_of(ledger: Path, spec: RunSpec) -> Callable[[PlanBook, Step], NDArray[np.int64]]:
    """Return what counts a step had, where some lanes had another plan than the rest, too."""
    with reading_ledger(ledger) as database:
        own = counts_of_their_own(LedgerView(database), spec)

    def counts_of(book: PlanBook, step: Step) -> NDArray[np.int64]:
        common = book.counts(step)
        if step not in own:
            return common
        by_lane = lane_counts(common, lanes=spec.lanes, seed=spec.seed, step=step)
        for lane, counts in own[step].items():
            theirs = lane_counts(counts, lanes=spec.lanes, seed=spec.seed, step=step)
            by_lane[lane] = theirs[lane]
        return np.asarray(by_lane.sum(axis=0))

    return counts_of


def make_report(
    findings: Findings,
    *,
    ranks: int,
    workers: int,
    model: str,
    wall_s: float,
    status: RunStatus | None,
) -> dict[str, Any]:
    """Return what report.json holds; `status` is the controller's last word, if there was one."""
    config, record = findings.config, findings.record
    tokens = record.tokens()
    domains = tuple(config.data.domains)
    last_plan = record.plans[-1] if record.plans else None
    return {
        "run": config.run,
        "policy": config.policy.name,
        "policy_phase": status.policy_phase if status else None,
        "steps": len(findings.history.steps),
        "planned_steps": config.steps,
        "ranks": ranks,
        "workers": workers,
        "model": model,
        "tokens": tokens,
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(tokens / wall_s, 1) if wall_s > 0 else None,
        "domains": _domains(findings),
        **checks(findings),
        "plan_versions": len(record.plans),
        **_timing(record, status),
        "generations": record.num_generations,
        "quarantined": len(record.quarantines),
        "ledger_head": record.head,
        "final_mixture": dict(zip(domains, last_plan.mixture.shares, strict=True))
        if last_plan
        else None,
    }


def checks(findings: Findings) -> dict[str, Any]:
    """Return the outcome of the accounting, as in report.json."""
    account, obedience = findings.account, findings.obedience
    inexact = [epoch.fault() for epoch in findings.epochs if not epoch.exact]
    return {
        "sequences": account.num_sequences,
        "lost": account.lost,
        "duplicated": account.duplicated,
        "mismatched": account.mismatched,
        "misordered": account.misordered,
        "padding_share": _padding_share(findings),
        "complete_epochs": dict(Counter(epoch.domain for epoch in findings.epochs)),
        "inexact_epochs": len(inexact),
        "superseded": findings.history.num_superseded,
        "unfinished_steps": len(findings.history.unfinished_steps),
        "max_share_error_sequences": obedience.max_share_error_sequences,
        "plans_obeyed": obedience.plans_obeyed,
        "disobeyed_steps": list(obedience.disobeyed_steps),
        "faults": account.faults + inexact[:MAX_FAULTS_NAMED],
    }


def _padding_share(findings: Findings) -> float | None:
    """Return which part of the places in the sequences received held no token."""
    num_tokens = [one.num_tokens for one in findings.history.deliveries]
    places = len(num_tokens) * (findings.config.batch.sequence_length + 1)
    return round(1 - sum(num_tokens) / places, 5) if places else None


def _domains(findings: Findings) -> dict[str, dict[str, Any]]:
    obedience = findings.obedience
    _, losses = findings.record.loss()
    edge = max(int(len(losses) * _EDGE_STEPS), 1)
    return {
        name: {
            "planned_sequences": obedience.planned_sequences[name],
            "delivered_sequences": obedience.delivered_sequences[name],
            "loss_first": _mean(losses[:edge, index]) if len(losses) else None,
            "loss_last": _mean(losses[-edge:, index]) if len(losses) else None,
        }
        for index, name in enumerate(findings.config.data.domains)
    }


def _mean(losses: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    """Return the mean of the losses that there are; None: the domain had none in these steps."""
    seen = losses[np.isfinite(losses)]
    return round(float(seen.mean()), 4) if len(seen) else None


def _timing(record: RunRecord, status: RunStatus | None) -> dict[str, Any]:
    totals: Mapping[str, Any] = record.totals
    step_s = totals.get("step_s", 0.0)
    decision_ms = None
    if status is not None and math.isfinite(status.decision_ms_p50):
        p50, p99 = status.decision_ms_p50, status.decision_ms_p99
        decision_ms = {"p50": round(p50, 2), "p99": round(p99, 2)}
    return {
        "decision_ms": decision_ms,
        "mixture_lag_steps": record.mixture_lag_steps(),
        "data_wait_share": _share(totals.get("data_wait_s", 0.0), step_s),
        "probe_share": _share(totals.get("probe_s", 0.0), step_s),
        "degraded_steps": totals.get("degraded_steps", 0),
        "missing_reports": totals.get("missing_reports", 0),
        "held_decisions": totals.get("held_decisions", 0),
    }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 5) if whole > 0 else None


def write_report(report: Mapping[str, Any], out: Path) -> Path:
    """Write report.json in one move."""
    path = out / REPORT
    write_whole(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return path


def write_run_digests(findings: Findings, out: Path) -> Path:
    """Write digests.jsonl."""
    path = out / DIGESTS
    write_digests(findings.history, path)
    return path


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the report as two short tables."""
    table = Table(title=f"{report['run']}: {report['policy']}", title_justify="left")
    table.add_column("domain")
    for name in ("planned", "delivered", "loss first", "loss last", "final share"):
        table.add_column(name, justify="right")
    final = report["final_mixture"] or {}
    for name, domain in report["domains"].items():
        table.add_row(
            name,
            f"{domain['planned_sequences']:,}",
            f"{domain['delivered_sequences']:,}",
            _number(domain["loss_first"], ".3f"),
            _number(domain["loss_last"], ".3f"),
            _number(final.get(name), ".1%"),
        )
    console.print(table)
    for line in summary_lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the rest of the report in a few lines."""
    decision = report["decision_ms"] or {}
    return [
        f"steps {report['steps']} of {report['planned_steps']}, {report['tokens']:,} tokens in "
        f"{report['wall_s']:.1f} s ({_number(report['tokens_per_s'], ',.0f')} tokens/s), "
        f"{report['ranks']} ranks, {report['workers']} workers",
        f"plans {report['plan_versions']}, all obeyed from their first step: "
        f"{'yes' if report['plans_obeyed'] else 'NO'}; largest share error "
        f"{math.floor(report['max_share_error_sequences'] * 1000) / 1000:.3f} sequences",
        f"of {report['sequences']:,} sequences lost {report['lost']}, duplicated "
        f"{report['duplicated']}, mismatched {report['mismatched']}, misordered "
        f"{report['misordered']}; quarantined {report['quarantined']}; padding "
        f"{_number(report['padding_share'], '.2%')}",
        _epochs_line(report),
        f"decisions {_number(decision.get('p50'), '.1f')} ms (p99 "
        f"{_number(decision.get('p99'), '.1f')} ms), obeyed after "
        f"{report['mixture_lag_steps']} steps; data wait "
        f"{_number(report['data_wait_share'], '.2%')} and probe "
        f"{_number(report['probe_share'], '.2%')} of step time; degraded steps "
        f"{report['degraded_steps']}",
        *(f"  {fault}" for fault in report["faults"]),
    ]


def _epochs_line(report: Mapping[str, Any]) -> str:
    complete = sum(report["complete_epochs"].values())
    if not complete:
        return "no domain's epoch was completed"
    exact = complete - report["inexact_epochs"]
    return f"of {complete} completed epochs {exact} delivered every token of the index once"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
