"""The tables of comparisons that were run once and kept: `python -m tests.learning.evidence_table`.

Writes `table.txt` beside each comparison's records, and one table of all ablations.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from deploy.compare.curves import TrialCurves
from deploy.compare.record import TrialRecord, read_records
from deploy.compare.spec import CompareSpec, load_spec
from deploy.compare.statistics import correlation
from deploy.compare.summary import summarise
from deploy.compare.table import print_results
from tests.learning import ablations

EVIDENCE = Path(__file__).with_name("evidence")
TABLE = "table.txt"


def comparisons() -> list[Path]:
    """Return the folders of the comparisons that were kept, ablations apart."""
    return [path for path in folders() if not path.name.startswith(ablations.PREFIX)]


def folders() -> list[Path]:
    """Return all folders with records."""
    return sorted(path.parent for path in EVIDENCE.glob("*/compare.yaml"))


def rendered(folder: Path) -> str:
    """Return a comparison's tables and verdict, from its records alone."""
    spec, records = load_spec(folder / "compare.yaml"), read_records(folder)
    screen = io.StringIO()
    print_results(summarise(spec, records), Console(file=screen, width=80, color_system=None))
    lines = [*screen.getvalue().splitlines(), *worth_of_own_share(spec, records)]
    return "".join(line.rstrip() + "\n" for line in lines)


def worth_of_own_share(spec: CompareSpec, records: Sequence[TrialRecord]) -> list[str]:
    """Say what a domain's own share does to its loss, and whether the reward goes by that.

    Over all trials of the comparison's model, each held against `uniform` of its seed: the slope of
    a domain's final test loss on the logarithm of its mean share; beside it the domain's mean
    reward (inner product with the other domains' gradients), where it was measured.
    """
    window = spec.evaluation.smoothing
    trials = [
        TrialCurves(record, window=window)
        for record in records
        if record.model == spec.training.model
    ]
    base = {trial.record.seed: trial for trial in trials if trial.record.arm == "uniform"}
    pairs = [
        (np.log(trial.executed / base[trial.record.seed].executed), trial, base[trial.record.seed])
        for trial in trials
        if trial.record.arm != "uniform" and trial.record.seed in base
    ]
    rewards = [found for trial in trials if (found := _mean_reward(trial.record)) is not None]
    if len(pairs) < 3 or not rewards:
        return []
    shares = np.asarray([share for share, _, _ in pairs])
    losses = np.asarray([trial.losses[-1] - control.losses[-1] for _, trial, control in pairs])
    slopes = [
        float(np.polyfit(column, loss, 1)[0])
        for column, loss in zip(shares.T, losses.T, strict=True)
    ]
    reward = np.mean(rewards, axis=0)
    lines = [
        "",
        f"what a domain's own share is worth, from {len(pairs)} trials against uniform",
        f"{'domain':18}{'nats an e-fold share':>22}{'mean reward':>14}",
    ]
    lines += [
        f"{name:18}{slope:22.3f}{mean:14.3f}"
        for name, slope, mean in zip(records[0].domains, slopes, reward, strict=True)
    ]
    agreement = correlation(reward, [-slope for slope in slopes])
    return [*lines, f"correlation over domains of reward and worth: {agreement:+.2f}"]


def _mean_reward(record: TrialRecord) -> NDArray[np.float64] | None:
    """Return [domains] means over a trial; None: not measured."""
    table = np.asarray([each.reward for each in record.intervals], dtype=np.float64)
    if not np.isfinite(table).all():
        return None
    mean: NDArray[np.float64] = table.mean(axis=0)
    return mean


if __name__ == "__main__":
    for found in comparisons():
        (found / TABLE).write_text(rendered(found))
        print(found / TABLE)
    (EVIDENCE / ablations.TABLE).write_text(ablations.ablation_table(EVIDENCE))
    print(EVIDENCE / ablations.TABLE)
