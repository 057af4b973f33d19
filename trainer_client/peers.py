"""Ranks that must see the same rows: tensor-, pipeline- and context-parallel peers.

One of them, the leader, has the session's streams and sends its reports; the others get what it
got by broadcasts on a gloo group of their own, in the trainer's thread. What goes over is arrays
and JSON, no pickle; an error of the leader reaches its peers as the same error.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

import protos.errors
from protos.errors import ConfigError, HeadraceError, NotReady

_DATA_AXES = ("dp", "ddp", "fsdp", "hsdp", "data", "replicate", "shard")

Arrays = dict[str, NDArray[Any]]
T = TypeVar("T")


class Peers:
    """The ranks that share this one's rows, and which of them reads for all."""

    def __init__(self, ranks: Sequence[int]) -> None:
        """Make a group of global ranks; each rank passes its own group, all of them do so."""
        self._leader = ranks[0]
        self.leads = dist.get_rank() == self._leader
        group = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group

    def share(self, produce: Callable[[], Arrays]) -> Arrays:
        """Return on every peer what `produce` returns on the leader.

        Raises:
            HeadraceError: what `produce` raised on the leader.
            NotReady: the leader is gone.
        """
        if not self.leads:
            return self._receive()
        try:
            arrays = produce()
        except HeadraceError as error:
            told = json.dumps([type(error).__name__, str(error)])
            self._broadcast(_packed({"error": _text_to_array(told)}))
            raise
        self._broadcast(_packed(arrays))
        return arrays

    def _receive(self) -> Arrays:
        try:
            arrays = _unpacked(self._broadcast(None))
        except RuntimeError as error:
            raise NotReady(
                f"rank {self._leader}, which reads the data for rank {dist.get_rank()}, is gone: "
                f"{error}"
            ) from error
        if "error" in arrays:
            name, message = json.loads(_array_to_text(arrays["error"]))
            kind = getattr(protos.errors, name, HeadraceError)
            raise kind(f"{message} (told by rank {self._leader})")
        return arrays

    def _broadcast(self, data: bytes | None) -> bytes:
        size = torch.tensor([0 if data is None else len(data)])
        dist.broadcast(size, src=self._leader, group=self._group)
        content = (
            torch.empty(int(size), dtype=torch.uint8)
            if data is None
            else torch.frombuffer(bytearray(data), dtype=torch.uint8)
        )
        dist.broadcast(content, src=self._leader, group=self._group)
        return content.numpy().tobytes()


def _packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _unpacked(data: bytes) -> Arrays:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _text_to_array(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def _array_to_text(array: NDArray[Any]) -> str:
    return array.tobytes().decode()


def places(mesh: Any, data_axes: Sequence[str] | None) -> tuple[list[int], list[int]]:
    """Return the ranks that share this rank's rows, and those of its data-parallel group.

    Args:
        mesh: the trainer's whole DeviceMesh, with named dimensions.
        data_axes: names of the dimensions over which data differs; None: those whose names begin
            like `dp`, `fsdp` or `data`.

    Raises:
        ConfigError: the mesh has no such dimension.
    """
    names = tuple(mesh.mesh_dim_names or ())
    wanted = data_axes
    if wanted is None:
        wanted = [name for name in names if name.startswith(_DATA_AXES)]
    if not wanted or not set(wanted) <= set(names):
        raise ConfigError(
            f"connect() cannot tell which dimensions of the mesh are data-parallel: it has "
            f"{', '.join(names) or 'no names'}; pass the whole mesh and data_axes=(...)"
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ConfigError(f"rank {dist.get_rank()} is not in the mesh given to connect()")
    own_rows = tuple(
        coordinate[axis] if name in wanted else slice(None) for axis, name in enumerate(names)
    )
    own_group = tuple(
        slice(None) if name in wanted else coordinate[axis] for axis, name in enumerate(names)
    )
    return mesh.mesh[own_rows].flatten().tolist(), mesh.mesh[own_group].flatten().tolist()
