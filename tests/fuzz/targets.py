"""What is fuzzed: each target takes any bytes, and fails only as its docstring says it may."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from controller.config import load_run_file
from controller.policy import artefact
from controller.policy.base import PolicyState
from loader_workers.samples import read_samples
from loader_workers.tar import TarReader
from protos import codec, codec_data
from protos.dataset_index import DatasetIndex
from protos.errors import ConfigError, HeadraceError, IndexMismatch, InvalidMessage, ShardUnreadable
from protos.wire import control_pb2, data_pb2
from tests.fakes_controller import join_request, make_beat, run_document, write_index
from tests.fakes_loader import shard_bytes
from trainer_client.checkpoint import unpack_state

Target = Callable[[bytes], None]

_SCRATCH = Path(tempfile.gettempdir()) / "headrace-fuzz"


def tar(data: bytes) -> None:
    """ShardUnreadable, whatever is in the archive."""
    reader = TarReader(io.BytesIO(data), num_bytes=len(data), shard="fuzzed")
    try:
        for _ in read_samples(reader, text_field="text"):
            pass
    except ShardUnreadable:
        return


def index(data: bytes) -> None:
    """IndexMismatch."""
    try:
        DatasetIndex.from_parquet(data)
    except IndexMismatch:
        return


def run_file(data: bytes) -> None:
    """ConfigError, or another of ours about what a policy's settings say."""
    try:
        load_run_file(_file(data))
    except HeadraceError:
        return


def policy_artefact(data: bytes) -> None:
    """ConfigError."""
    try:
        artefact.load(_file(data))
    except ConfigError:
        return


def state_dict(data: bytes) -> None:
    """ConfigError, for anything that JSON can say."""
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(state, dict):
        return
    try:
        unpack_state(state)
    except ConfigError:
        return


_DECODERS: list[tuple[type[Any], Callable[[Any], Any]]] = [
    (control_pb2.JoinRequest, codec.join_request_from_proto),
    (control_pb2.ReportRequest, codec.report_from_proto),
    (control_pb2.EnlistRequest, codec.worker_beat_from_proto),
    (control_pb2.JoinResponse, codec.join_answer_from_proto),
    (control_pb2.WatchPlansResponse, codec.plan_event_from_proto),
    (control_pb2.EnlistResponse, codec.enlist_event_from_proto),
    (data_pb2.StreamBatchesRequest, codec_data.open_stream_from_proto),
]


def codecs(data: bytes) -> None:
    """InvalidMessage; the first byte chooses the message."""
    if not data:
        return
    kind, decode = _DECODERS[data[0] % len(_DECODERS)]
    try:
        decode(kind.FromString(data[1:]))
    except (DecodeError, InvalidMessage):
        return


def _file(data: bytes) -> Path:
    _SCRATCH.mkdir(exist_ok=True)
    path = _SCRATCH / "input"
    path.write_bytes(data)
    return path


TARGETS: dict[str, Target] = {
    "tar": tar,
    "index": index,
    "run_file": run_file,
    "policy_artefact": policy_artefact,
    "state_dict": state_dict,
    "codecs": codecs,
}


def seeds(name: str, folder: Path) -> list[bytes]:
    """Return good inputs of a target, to begin from; `folder` is for what they need."""
    if name == "tar":
        samples: list[dict[str, bytes | str]] = [
            {"__key__": "a", "txt": b"words"},
            {"__key__": "b", "json": b'{"text": "more"}'},
        ]
        return [shard_bytes(samples)]
    if name == "index":
        return [write_index(folder / "index.parquet").to_parquet()]
    if name == "run_file":
        return [json.dumps(run_document(folder)).encode()]
    if name == "policy_artefact":
        path = folder / "state"
        artefact.save(PolicyState(arrays={"a": np.arange(4.0)}, values={"n": 1}), path)
        return [path.read_bytes()]
    if name == "state_dict":
        cursors = {"0": [[0, 1, 2], [3, 4, 5]]}
        state = {"version": 1, "run_id": "r", "order_sha256": "0" * 64, "step": 3}
        return [json.dumps({**state, "world_size": 1, "cursors": cursors}).encode()]
    return [
        b"\0" + codec.join_request_to_proto(join_request(0, 1)).SerializeToString(),
        b"\2" + codec.worker_beat_to_proto(make_beat()).SerializeToString(),
    ]
