"""Our types <-> messages, for what operators see."""

from __future__ import annotations

from protos.codec_common import (
    checked,
    field_names,
    mixture_from_proto,
    mixture_to_proto,
    quarantine_from_proto,
    quarantine_to_proto,
)
from protos.status import RunStatus, ShadowStatus, WorkerStatus
from protos.wire import admin_pb2 as admin

_STATUS_FIELDS = field_names(
    RunStatus, but={"domains", "loss", "mixture", "quarantines", "workers", "shadows"}
)
_WORKER_FIELDS = field_names(WorkerStatus, but={"lanes"})


def status_to_proto(status: RunStatus) -> admin.StatusResponse:
    """Encode how a run stands."""
    return admin.StatusResponse(
        domains=status.domains,
        loss=status.loss,
        mixture=mixture_to_proto(status.mixture),
        quarantines=[quarantine_to_proto(item) for item in status.quarantines],
        workers=[_worker_to_proto(worker) for worker in status.workers],
        shadows=[
            admin.ShadowStatus(name=one.name, phase=one.phase, shares=one.shares, fault=one.fault)
            for one in status.shadows
        ],
        **{name: getattr(status, name) for name in _STATUS_FIELDS},
    )


@checked
def status_from_proto(message: admin.StatusResponse) -> RunStatus:
    """Decode how a run stands."""
    return RunStatus(
        domains=tuple(message.domains),
        loss=tuple(message.loss),
        mixture=mixture_from_proto(message.mixture),
        quarantines=tuple(quarantine_from_proto(item) for item in message.quarantines),
        workers=tuple(_worker_from_proto(worker) for worker in message.workers),
        shadows=tuple(
            ShadowStatus(name=one.name, phase=one.phase, shares=tuple(one.shares), fault=one.fault)
            for one in message.shadows
        ),
        **{name: getattr(message, name) for name in _STATUS_FIELDS},
    )


def _worker_to_proto(worker: WorkerStatus) -> admin.WorkerStatus:
    fields = {name: getattr(worker, name) for name in _WORKER_FIELDS}
    return admin.WorkerStatus(lanes=worker.lanes, **fields)


def _worker_from_proto(message: admin.WorkerStatus) -> WorkerStatus:
    fields = {name: getattr(message, name) for name in _WORKER_FIELDS}
    return WorkerStatus(lanes=tuple(message.lanes), **fields)
