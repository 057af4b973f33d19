"""The `log_fn`s of the trackers, on the real libraries, with no network: `make test-trackers`."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_reporter import Controller, pending
from trainer_client import LogFn
from trainer_client.integrations.logs import MlflowLog, TensorBoardLog, TrackioLog, WandbLog
from trainer_client.reporter import Reporter
from trainer_client.step_log import step_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    # Of the libraries, which warn of one another.
    pytest.mark.filterwarnings("default"),
]

DOMAINS = ("web", "../co#de[]")
NUM_STEPS = 5
WHERE = "run `make test-trackers`, which installs it into an environment of its own"


def trained(log: LogFn) -> None:
    """Have a reporter's thread tell of five steps."""
    reporter = Reporter(Controller().report, heard=step_log(log, DOMAINS))
    for step in range(NUM_STEPS):
        reporter.offer(pending(step))
    assert reporter.flush(timeout_s=120)
    reporter.close()


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: {WHERE}")


def test_tensorboard_has_a_curve_for_each_figure(tmp_path: Path) -> None:
    imported("tensorboard")
    log = TensorBoardLog(tmp_path)
    trained(log)
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path))
    found.Reload()
    curve = found.Scalars("headrace/loss/web")
    assert [(each.step, each.value) for each in curve] == [(step, 0.5) for step in range(5)]
    assert "headrace/share/web" in found.Tags()["scalars"]


def test_wandb_offline_keeps_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = imported("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="test", mode="offline", dir=str(tmp_path))
    trained(WandbLog(run))
    run.finish()
    rows = wandb_rows(wandb, next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    steps = [row["headrace/step"] for row in rows if "headrace/step" in row]
    assert steps == list(range(NUM_STEPS))
    assert [row["headrace/loss/web"] for row in rows if "headrace/loss/web" in row] == [0.5] * 5


def wandb_rows(wandb: Any, path: Path) -> list[dict[str, Any]]:
    """Read the history back out of W&B's own file."""
    import json

    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(path))
    rows = []
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return rows


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_mlflow_has_every_step_in_either_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    mlflow = imported("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"sqlite:///{tmp_path}/runs.db" if store == "sqlite" else (tmp_path / "runs").as_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("test")
    with mlflow.start_run() as run:
        trained(MlflowLog(run.info.run_id, tracking_uri=uri))
    client = mlflow.tracking.MlflowClient(uri)
    curve = client.get_metric_history(run.info.run_id, "headrace/loss/web")
    assert [(each.step, each.value) for each in curve] == [(step, 0.5) for step in range(5)]
    # A name that would lead out of the store's folder, or is none of MLflow's, is another one.
    hostile = client.get_metric_history(run.info.run_id, "headrace/loss/_/co_de__")
    assert len(hostile) == NUM_STEPS
    assert math.isclose(hostile[0].value, 0.625)


def test_trackio_keeps_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = imported("trackio")
    run = trackio.init(project="test", name="one", embed=False)
    trained(TrackioLog(run))
    trackio.finish()
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("test", "one")
    by_step = {row["step"]: row for row in rows}
    assert sorted(by_step) == list(range(NUM_STEPS))
    assert by_step[3]["headrace/loss/web"] == 0.5
