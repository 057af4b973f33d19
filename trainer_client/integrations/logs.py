"""`log_fn`s for the usual trackers: `connect(address, log_fn=TensorBoardLog("runs/mine"))`.

Usually on rank 0 alone: `log_fn=... if rank == 0 else None`. Each needs its own library, which
none of Headrace's extras brings. The figures are those of `trainer_client.step_log.step_metrics`,
below `headrace/`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREFIX = "headrace/"
_MLFLOW_FORBIDS = re.compile(r"[^\w\-./ :]", flags=re.ASCII)
_MLFLOW_AT_ONCE = 1000
_MLFLOW_CHARS = 250


class TensorBoardLog:
    """Writes event files into a folder; needs `tensorboard`."""

    def __init__(self, folder: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the figures of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(PREFIX + name, value, step)

    def close(self) -> None:
        """Write what is held; call it after `session.close()`."""
        self._writer.close()


class WandbLog:
    """Logs into the run that `wandb.init` returned.

    The figures come a little after their step, so they have a step axis of their own,
    `headrace/step`, on which W&B draws them. Log your own without `step=` as well: W&B drops what
    comes with a step below its own count.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric(f"{PREFIX}step", hidden=True)
        run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the figures of a step."""
        named = {PREFIX + name: value for name, value in metrics.items()}
        self._run.log({**named, f"{PREFIX}step": step})


class TrackioLog:
    """Logs into the run that `trackio.init` returned."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the figures of a step."""
        self._run.log({PREFIX + name: value for name, value in metrics.items()}, step=step)


class MlflowLog:
    """Logs into an MLflow run, whichever thread began it; needs `mlflow` or `mlflow-skinny`.

    Characters that MLflow allows in no name (`[`, `#`, ...) become `_`.
    """

    def __init__(self, run_id: str, *, tracking_uri: str | None = None) -> None:
        """Tell which run, as `mlflow.active_run().info.run_id` says."""
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri)
        self._run_id = run_id

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the figures of a step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        named = {_mlflow_name(PREFIX + name): value for name, value in metrics.items()}
        rows = [Metric(name, value, now_ms, step) for name, value in named.items()]
        for first in range(0, len(rows), _MLFLOW_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=rows[first : first + _MLFLOW_AT_ONCE])


def _mlflow_name(name: str) -> str:
    # Names are paths of files in some of its stores: none may lead out of its folder.
    parts = [
        part if part.strip(". ") else "_" for part in _MLFLOW_FORBIDS.sub("_", name).split("/")
    ]
    return "/".join(parts)[:_MLFLOW_CHARS]
