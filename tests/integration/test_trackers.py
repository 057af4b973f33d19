"""The `log_fn`s of the trackers, on the real libraries, with no network: `make test-trackers`."""

from __future__ import annotations

import json
import math
import struct
import warnings
from collections.abc import Iterator
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
_BLOCK = 32768
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
    rows = wandb_rows(next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    steps = [row["headrace/step"] for row in rows if "headrace/step" in row]
    assert steps == list(range(NUM_STEPS))
    assert [row["headrace/loss/web"] for row in rows if "headrace/loss/web" in row] == [0.5] * 5


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """Read the history back out of W&B's own file."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in leveldb_records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
            )
    return rows


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, whose first block has lost 7 bytes."""
    at, held = 0, b""
    while at + 7 <= len(log):
        left = _BLOCK - (at + 7) % _BLOCK
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", log, at + 4)
        held += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or the last of it
            yield held
            held = b""


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
