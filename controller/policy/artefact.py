"""A policy's state as one safetensors file, its JSON values in the file's header; never pickle.

The file appears whole or not at all, and one that is damaged or foreign is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from controller.policy.base import PolicyState
from protos.errors import ConfigError

FORMAT = "headrace.policy.v1"


def save(state: PolicyState, path: Path) -> None:
    """Write `state` to `path`, replacing what is there; when it returns, it is on the disk."""
    arrays = {name: np.asarray(array, order="C") for name, array in state.arrays.items()}
    values = json.dumps(state.values, sort_keys=True, allow_nan=False)
    metadata = {"format": FORMAT, "values": values, "sha256": _digest(arrays, values)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own in the same folder: renaming is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(to_safetensors(arrays, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def load(path: Path) -> PolicyState:
    """Read what `save` wrote.

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
    values = metadata.get("values", "")
    if _digest(arrays, values) != metadata.get("sha256"):
        raise ConfigError(f"the policy state {path} is damaged: its checksum does not match")
    return PolicyState(arrays=arrays, values=json.loads(values))


def _digest(arrays: Mapping[str, NDArray[Any]], values: str) -> str:
    digest = hashlib.sha256(values.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
