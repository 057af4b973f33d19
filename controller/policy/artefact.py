"""A policy's state as one safetensors file, its JSON values in the file's header; never pickle.

The file appears whole or not at all, and one that is damaged or foreign is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from controller.policy.base import PolicyState
from protos.errors import ConfigError
from protos.failpoints import DurableWrite, Failpoint

FORMAT = "headrace.policy.v1"

_DTYPES = {
    "|b1": "BOOL",
    "|u1": "U8",
    "<u2": "U16",
    "<u4": "U32",
    "<u8": "U64",
    "<i4": "I32",
    "<i8": "I64",
    "<f4": "F32",
    "<f8": "F64",
}
"""numpy's names of what policies save, and those of safetensors."""

_WRITTEN = Failpoint("policy.written", "after a policy state is written, before it is synced")
_RENAME = DurableWrite("policy.rename", "a synced policy state gets its name")

_PADDING = 8
"""Bytes to whose multiples the header is filled up, so that numbers lie where they should."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """What a file holds."""

    state: PolicyState
    origin: Mapping[str, Any]
    """JSON values: the run that the state comes from; empty if nobody said."""

    sha256: str
    """Of the state and its origin."""


def save(state: PolicyState, path: Path, *, origin: Mapping[str, Any] | None = None) -> None:
    """Write `state` to `path`, replacing what is there; when it returns, it is on the disk.

    The arrays are written as they lie in memory, without a copy, and other threads run meanwhile.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in state.arrays.items()}
    values = json.dumps(state.values, sort_keys=True, allow_nan=False)
    source = json.dumps(dict(origin or {}), sort_keys=True, allow_nan=False)
    metadata = {"format": FORMAT, "values": values, "origin": source}
    metadata["sha256"] = _digest(arrays, values, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own in the same folder: renaming is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in _parts(arrays, metadata):
                file.write(part)
            file.flush()
            _WRITTEN.hit()
            os.fsync(file.fileno())
        with _RENAME.around():
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def load(path: Path) -> PolicyState:
    """Read the state that `save` wrote.

    Raises:
        ConfigError: there is no such file, or it is damaged, or no policy state.
    """
    return read(path).state


def read(path: Path) -> Artefact:
    """Read all that `save` wrote.

    Raises:
        ConfigError: there is no such file, or it is damaged, or no policy state.
    """
    if not path.is_file():
        raise ConfigError(f"there is no policy state at {path}; check the path")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ConfigError(
                    f"{path} is not a policy state (format {metadata.get('format')!r}, "
                    f"wanted {FORMAT!r})"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"the policy state {path} is damaged: {error}") from error
    values, source = metadata.get("values", ""), metadata.get("origin", "")
    sha256 = _digest(arrays, values, source)
    if sha256 != metadata.get("sha256"):
        raise ConfigError(f"the policy state {path} is damaged: its checksum does not match")
    return Artefact(
        state=PolicyState(arrays=arrays, values=json.loads(values)),
        origin=json.loads(source),
        sha256=sha256,
    )


def _parts(
    arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file: the header's length, the header, the arrays' bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    # Widest numbers first, so that all are aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    end = 0
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.str],
            "shape": array.shape,
            "data_offsets": [begin, end],
        }
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % _PADDING)
    yield len(written).to_bytes(8, "little")
    yield written
    for name in names:
        yield _bytes_of(arrays[name])


def _bytes_of(array: NDArray[Any]) -> memoryview:
    flat: memoryview = array.reshape(-1).view(np.uint8).data
    return flat


def _digest(arrays: Mapping[str, NDArray[Any]], values: str, origin: str) -> str:
    digest = hashlib.sha256(f"{values}\0{origin}".encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(_bytes_of(array))
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
