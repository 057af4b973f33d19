"""What single settings of AC-ODM change: the table of the kept ablations.

`python -m tests.learning.evidence_table` writes it. A trial is AC-ODM as `main` has it but for one
setting, held against `acodm`, `uniform` and `natural` of the same seed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deploy.compare.curves import MACRO, NATURAL, TrialCurves
from deploy.compare.record import read_records
from deploy.compare.spec import load_spec

TABLE = "ablations.txt"
PREFIX = "ablation"
"""Of folders; what follows it names a setting that all arms of a comparison share."""

_BASE = "acodm"
_CONTROLS = ("uniform", "natural")
_HEAD = (
    f"{'AC-ODM but for':16}{'seed':>5}{'- acodm':>9}{'- uniform':>11}{'- natural':>11}{'moved':>7}"
    f"{'SNR':>6}{'crit. EV':>10}\n"
    f"{'':21}{'mean':>9}{'mean':>11}{'weighted':>11}\n"
)

Held = Mapping[tuple[str, int], TrialCurves]


def ablation_table(evidence: Path) -> str:
    """Return the table of all ablations below a folder, in nats a token.

    `moved`: half the sum of what domains' mean shares differ by from those of `acodm`. `SNR`:
    rewards' spread over domains by their noise from step to step. `crit. EV`: part of its targets'
    variance that the critic explained at the end.
    """
    window = load_spec(evidence / "main" / "compare.yaml").evaluation.smoothing
    held = _curves(evidence / "main", window)
    lines = []
    for folder in sorted(evidence.glob(f"{PREFIX}*")):
        shared = folder.name.removeprefix(PREFIX).removeprefix("_")
        for (arm, seed), curves in sorted(_curves(folder, window).items()):
            if shared or arm != _BASE:
                lines.append(_line(shared or arm, seed, curves, held))
    return _HEAD + "".join(lines)


def _curves(folder: Path, window: int) -> Held:
    return {
        (record.arm, record.seed): TrialCurves(record, window=window)
        for record in read_records(folder)
    }


def _line(name: str, seed: int, curves: TrialCurves, held: Held) -> str:
    base, uniform, natural = (held[arm, seed] for arm in (_BASE, *_CONTROLS))
    moved = float(np.abs(curves.executed - base.executed).sum() / 2)
    snr = curves.reward_snr()
    explained = curves.diagnostics().get("critic_explained_variance")
    macro, weighted = (curves.curve(metric)[-1] for metric in (MACRO, NATURAL))
    return (
        f"{name:16}{seed:5}{macro - base.curve(MACRO)[-1]:+9.4f}"
        f"{macro - uniform.curve(MACRO)[-1]:+11.4f}{weighted - natural.curve(NATURAL)[-1]:+11.4f}"
        f"{moved:7.2f}{_figure(snr):>6}{_figure(explained):>10}\n"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
