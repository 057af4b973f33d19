"""The library inside the trainer: batches in the run's mixture, and the reports that steer it.

    session = trainer_client.connect("controller-host:7700")
    probe = session.probe(model)
    for batch in session.batches(micro_batch=8, device=device):
        loss = session.loss(model(batch.tokens), batch)
        loss.backward()
        if batch.last_of_step:
            optimizer.step(); optimizer.zero_grad()
            session.end_step()

Importing it imports neither grpc nor ray.
"""

from __future__ import annotations

import protos

if getattr(protos, "HEADRACE", None) != "headrace":
    _found = getattr(protos, "__file__", None) or ", ".join(getattr(protos, "__path__", ["?"]))
    raise ImportError(
        f"trainer_client needs Headrace's own package `protos`, but Python found another one at "
        f"{_found}: rename that one, or start the script from a folder that does not hold it"
    )

from protos.errors import (
    AccessRefused,
    ConfigError,
    ControllerUnreachable,
    DataError,
    Disagreement,
    HeadraceError,
    JoinTimeout,
    NotAuthenticated,
    NotReady,
    Rejected,
    Retryable,
    StaleGeneration,
    WorkerUnreachable,
    WrongRun,
)
from protos.security import Security
from trainer_client.batches import Batch
from trainer_client.checkpoint import merge_states
from trainer_client.connecting import connect
from trainer_client.documents import Documents
from trainer_client.probe import GradientProbe
from trainer_client.session import Session
from trainer_client.step_log import LogFn

__all__ = [
    "AccessRefused",
    "Batch",
    "ConfigError",
    "ControllerUnreachable",
    "DataError",
    "Disagreement",
    "Documents",
    "GradientProbe",
    "HeadraceError",
    "JoinTimeout",
    "LogFn",
    "NotAuthenticated",
    "NotReady",
    "Rejected",
    "Retryable",
    "Security",
    "Session",
    "StaleGeneration",
    "WorkerUnreachable",
    "WrongRun",
    "connect",
    "merge_states",
]
