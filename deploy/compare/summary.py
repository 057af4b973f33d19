"""From finished trials to `results.json`: every figure of the report, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from deploy.compare.curves import (
    MACRO,
    METRIC_NAMES,
    NATURAL,
    WORST,
    Reached,
    TrialCurves,
)
from deploy.compare.record import TrialRecord
from deploy.compare.spec import CompareSpec
from deploy.compare.statistics import Estimate, estimate
from deploy.compare.verdict import verdict

RESULTS_FILE = "results.json"

Json = dict[str, Any]

TARGETS = (("uniform", MACRO), ("natural", NATURAL), ("natural", MACRO), ("uniform", NATURAL))
"""Whose final value, in which metric, other arms should reach: first the static controls' own
metrics, which are what they are good at."""

BASELINES = ("uniform", "natural")


class Trials:
    """The finished trials of a comparison, by arm and seed."""

    def __init__(self, spec: CompareSpec, records: Sequence[TrialRecord]) -> None:
        """Take the records of the spec's arms; others are left out."""
        window = spec.evaluation.smoothing
        self.spec = spec
        self.by_arm: dict[str, dict[int, TrialCurves]] = {arm: {} for arm in spec.arms}
        for record in records:
            if record.arm in self.by_arm and record.seed in spec.seeds:
                self.by_arm[record.arm][record.seed] = TrialCurves(record, window=window)

    @property
    def shown(self) -> list[str]:
        """The arms that are held against one another and have a finished trial."""
        return [arm for arm in self.spec.arms if self.spec.arms[arm].shown and self.by_arm[arm]]

    def final(self, arm: str, seed: int, metric: str) -> float | None:
        """Return a trial's final value; None: it cannot be told yet."""
        natural = self.by_arm.get("natural", {}).get(seed)
        return self.by_arm[arm][seed].final(metric, natural)

    def finals(self, arm: str, metric: str) -> dict[int, float]:
        """Return the final values that are known, by seed."""
        found = {seed: self.final(arm, seed, metric) for seed in sorted(self.by_arm[arm])}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, values: Sequence[float]) -> Json | None:
        """Return the mean over seeds and its interval as JSON values."""
        if not values:
            return None
        return asdict(self._estimate(values))

    def _estimate(self, values: Sequence[float]) -> Estimate:
        return estimate(values, confidence=self.spec.evaluation.confidence)

    def paired(self, arm: str, other: str, metric: str) -> Json | None:
        """Return arm - other over the seeds that both have; below 0: the arm is better."""
        here, there = self.finals(arm, metric), self.finals(other, metric)
        seeds = sorted(here.keys() & there.keys())
        if not seeds:
            return None
        differences = [here[seed] - there[seed] for seed in seeds]
        found = self._estimate(differences)
        return {
            **asdict(found),
            "differences": dict(zip(map(str, seeds), differences, strict=True)),
            "excludes_zero": found.excludes_zero,
        }


def summarise(spec: CompareSpec, records: Sequence[TrialRecord]) -> Json:
    """Return what is known of a comparison from the trials finished so far."""
    trials = Trials(spec, records)
    arms = {arm: _arm(trials, arm) for arm in trials.shown}
    results: Json = {
        "settings": spec.model_dump(mode="json", exclude={"data": {"source", "prepared"}}),
        "domains": records[0].domains if records else [],
        "natural": records[0].natural if records else [],
        "tokens": records[0].tokens_a_step * spec.steps if records else 0,
        "metrics": METRIC_NAMES,
        "seeds_wanted": list(spec.seeds),
        "arms": arms,
        "missing": [arm for arm in spec.arms if spec.arms[arm].shown and arm not in arms],
        "paired": {
            metric: {
                arm: {other: trials.paired(arm, other, metric) for other in arms if other != arm}
                for arm in arms
            }
            for metric in (MACRO, NATURAL, WORST)
        },
    }
    results["verdict"] = verdict(results)
    return results


def _arm(trials: Trials, arm: str) -> Json:
    curves = trials.by_arm[arm]
    seeds = sorted(curves)
    some = curves[seeds[0]].record
    charged = _charged(trials, arm)
    return {
        "seeds": seeds,
        "policy": some.policy["name"],
        "model": some.model,
        "parameters": some.parameters,
        "charged": {"arms": some.charged, "steps": charged},
        "validation": {
            "evaluations": some.policy_validations,
            "tokens": some.validation_tokens,
        },
        "final": {
            metric: trials.estimate(list(trials.finals(arm, metric).values()))
            for metric in METRIC_NAMES
        },
        "final_by_domain": _mean(curves, lambda each: each.losses[-1]),
        "final_by_domain_less": {
            control: _less(curves, trials.by_arm[control])
            for control in BASELINES
            if control in trials.by_arm and curves.keys() & trials.by_arm[control].keys()
        },
        "reached": {
            f"{control} {metric}": _reached(trials, arm, control, metric, charged)
            for control, metric in TARGETS
            if trials.by_arm.get(control)
        },
        "curves": {
            "steps": curves[seeds[0]].steps.tolist(),
            **{
                metric: {str(seed): curves[seed].curve(metric).tolist() for seed in seeds}
                for metric in (MACRO, NATURAL)
            },
        },
        "mixture": {
            "mean": _mean(curves, lambda each: each.executed),
            "over_time": _mean(
                curves, lambda each: np.asarray([step.planned for step in each.record.intervals])
            ),
            "entropy": float(np.mean([each.entropy() for each in curves.values()])),
            "max_share_error_sequences": max(
                each.record.max_share_error_sequences for each in curves.values()
            ),
        },
        "epochs": _mean(curves, lambda each: np.asarray(each.record.epochs)),
        "reward": {
            "signal_to_noise": _known_mean([each.reward_snr() for each in curves.values()]),
            "foresight": _known_mean([each.reward_foresight() for each in curves.values()]),
        },
        "diagnostics": _diagnostics(list(curves.values())),
        "held_decisions": sum(each.record.held_decisions for each in curves.values()),
        "guard_changes": _sums([each.record.guard_changes for each in curves.values()]),
        "resumed": sum(len(each.record.resumed_at) for each in curves.values()),
        "time": _time(curves),
    }


def _reached(trials: Trials, arm: str, control: str, metric: str, charged_steps: float) -> Json:
    """Tell where an arm's trials reach the final value of the control's trial of the same seed."""
    by_seed: dict[str, Json | None] = {}
    parts: list[float] = []
    for seed in sorted(trials.by_arm[arm].keys() & trials.by_arm[control].keys()):
        target = trials.by_arm[control][seed].final(metric)
        assert target is not None
        curves = trials.by_arm[arm][seed]
        found: Reached | None = curves.reach(metric, target)
        if found is None:
            by_seed[str(seed)] = None
            continue
        values = asdict(found)
        time = {"wall_s": values.pop("wall_s"), "cpu_s": values.pop("cpu_s")}
        by_seed[str(seed)] = {**values, "target": target, "time": time}
        parts.append((found.steps + charged_steps) / curves.record.steps)
    return {
        "by_seed": by_seed,
        "never": sum(each is None for each in by_seed.values()),
        "share_of_steps": trials.estimate(parts),
    }


def _charged(trials: Trials, arm: str) -> float:
    """Return what the trials that an arm needed cost, in steps of the arm's own model."""
    curves = trials.by_arm[arm]
    record = curves[min(curves)].record
    total = 0.0
    for other in record.charged:
        found = trials.by_arm.get(other, {})
        if found:
            proxy = found[min(found)].record
            cost = proxy.matrix_parameters * proxy.tokens_a_step * proxy.steps
            total += cost / (record.matrix_parameters * record.tokens_a_step)
    return total


def _time(curves: Mapping[int, TrialCurves]) -> Json:
    records = [each.record for each in curves.values()]
    return {
        "wall_s": float(np.mean([each.evaluations[-1].wall_s for each in records])),
        "cpu_s": float(np.mean([each.evaluations[-1].cpu_s for each in records])),
        "decide_ms_p50": float(np.median([each.decide_ms["p50"] for each in records])),
        "decide_ms_p99": float(np.max([each.decide_ms["p99"] for each in records])),
        "probe_share": float(np.mean([each.probe_share for each in records])),
    }


def _mean(
    curves: Mapping[int, TrialCurves], of: Callable[[TrialCurves], np.ndarray[Any, Any]]
) -> list[Any]:
    mean: list[Any] = np.mean([of(each) for each in curves.values()], axis=0).tolist()
    return mean


def _less(curves: Mapping[int, TrialCurves], control: Mapping[int, TrialCurves]) -> list[float]:
    """Return [domains] final losses less the control's, over the seeds that both have."""
    common = sorted(curves.keys() & control.keys())
    found: list[float] = np.mean(
        [curves[seed].losses[-1] - control[seed].losses[-1] for seed in common], axis=0
    ).tolist()
    return found


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _sums(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = sorted({name for each in counts for name in each})
    return {name: sum(each.get(name, 0) for each in counts) for name in names}


def _diagnostics(curves: Sequence[TrialCurves]) -> dict[str, float]:
    told = [each.diagnostics() for each in curves]
    names = sorted({name for each in told for name in each})
    return {name: float(np.mean([each[name] for each in told if name in each])) for name in names}
