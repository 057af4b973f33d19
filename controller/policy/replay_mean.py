"""The `replay_mean` policy: another run's mean mixture, the same at every step.

A control: what a policy gains over this it gains by *when* it chose what it chose. The mean is over
the sequences that the other run's ranks received, in the steps that count (of a step that was
trained again after a resume, the newest). Instead of a run a policy's snapshot can be named that
holds a `final` mixture, as those of `doremi` and `doge` do, or a JSON file of shares by domain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.history import newest_line
from controller.ledger import read_rows, reading_ledger
from controller.ledger_schema import Kind
from controller.observation import StepObservation
from controller.policy import artefact
from controller.policy.base import PolicyContext, Statistic
from controller.policy.online import FINAL, OnlinePolicy
from controller.policy.settings_of_rivals import ReplayMeanConfig
from protos.errors import ConfigError, LedgerError

LEDGER = "ledger.sqlite"
"""As a run's folder has it."""


class ReplayMeanPolicy(OnlinePolicy):
    """Holds the mean; in a run that goes on, the one that it began with."""

    def __init__(self, config: ReplayMeanConfig, context: PolicyContext) -> None:
        """Read the mean.

        Raises:
            ConfigError: there is none, or it is of other domains.
        """
        super().__init__(config, context, np.asarray(mean_shares(config.source, context)))

    @property
    def phase(self) -> str:
        """Always the same."""
        return "fixed"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Nothing."""
        return frozenset()

    def _learn(self, observation: StepObservation) -> None:
        """Learn nothing."""


def mean_shares(source: Path, context: PolicyContext) -> tuple[float, ...]:
    """Return the [domains] mean shares of the run, or the shares of the file, that `source` names.

    Raises:
        ConfigError: it is missing, or of other domains, or says nothing.
    """
    path = source / LEDGER if source.is_dir() else source
    if not path.is_file():
        raise ConfigError(
            f"policy.from names {source}, where there is no run: it must be a run's folder (with "
            f"its {LEDGER}), a ledger, a policy's snapshot, or a JSON file of shares by domain"
        )
    by_domain = _READERS.get(path.suffix, _of_ledger)(path)
    domains = context.domains
    missing, foreign = set(domains) - by_domain.keys(), by_domain.keys() - set(domains)
    if missing or foreign:
        raise ConfigError(
            f"policy.from names {source}, which is of other domains: this run has "
            f"{', '.join(sorted(missing)) or 'none'} besides, that one "
            f"{', '.join(sorted(foreign)) or 'none'}"
        )
    total = math.fsum(by_domain.values())
    return tuple(by_domain[domain] / total for domain in domains)


def _of_ledger(path: Path) -> dict[str, float]:
    domains: list[str] = []
    try:
        with reading_ledger(path) as database:
            rows = list(read_rows(database, Kind.RUN, Kind.FORK, Kind.STEP))
    except LedgerError as error:
        raise ConfigError(f"policy.from cannot be read: {error}") from error
    for row in rows:
        if row.kind is Kind.RUN:
            domains = row.body["domains"]
    counted = [row.body["observation"]["sequences"] for row in newest_line(rows).values()]
    if not counted or not np.sum(counted) > 0:
        raise ConfigError(f"policy.from names {path}, a run of which no step was reported yet")
    totals: NDArray[np.int64] = np.sum(counted, axis=0)
    return dict(zip(domains, totals.tolist(), strict=True))


def _of_snapshot(path: Path) -> dict[str, float]:
    final = artefact.load(path).values.get(FINAL)
    if not isinstance(final, Mapping):
        raise ConfigError(
            f"policy.from names {path}, which holds no final mixture: only snapshots of doremi and "
            "doge do, once they have observed a step"
        )
    return {str(domain): float(share) for domain, share in final.items()}


def _of_file(path: Path) -> dict[str, float]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.from names {path}, which is no JSON file: {error}") from error
    if not isinstance(found, Mapping) or not all(map(_is_share, found.values())):
        raise ConfigError(
            f"policy.from names {path}, which must be a JSON object of shares by domain, each "
            "finite and not negative"
        )
    if not math.fsum(found.values()) > 0:
        raise ConfigError(f"policy.from names {path}, in which no share is above 0")
    return {str(domain): float(share) for domain, share in found.items()}


def _is_share(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0


_READERS = {".json": _of_file, ".safetensors": _of_snapshot}
