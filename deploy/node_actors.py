"""Controller and loader workers as actors of a cluster: at their node's address, with their log."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from controller.actor import ControllerHost
from controller.config import RunConfig
from loader_workers.actor import LoaderHost
from loader_workers.worker import WorkerSettings
from protos.errors import ConfigError
from protos.log_format import configure_logging
from protos.security import is_loopback, split_address

_LOG_CHUNK = 256_000
_RAYS_OWN = (b":job_id:", b":actor_name:", b":task_name:")
"""How lines begin that Ray writes into every log."""

_ANY = ("0.0.0.0", "[::]", "::")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogPart:
    """A part of what an actor's process has written."""

    pid: int
    """Of the process: another one begins another log."""

    end: int
    """Where the next part begins, in bytes."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """Where an actor's process runs."""

    node: str
    """The node's address."""

    host: str
    pid: int


class AtNode:
    """What all actors of a cluster can say of themselves."""

    def where(self) -> Whereabouts:
        """Return where the process runs."""
        return Whereabouts(node=node_address(), host=socket.gethostname(), pid=os.getpid())

    def log(self, start: int = 0) -> LogPart:
        """Return what the process has written from `start` on, up to 256 kB of it.

        Negative: the last so many bytes. Ray keeps older processes' logs in its own folder.
        """
        path = Path("/proc/self/fd/2").resolve()
        if not path.is_file():
            return LogPart(pid=os.getpid(), end=0, text="(this process writes to no file)\n")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size + start) if start < 0 else min(start, size))
            data = file.read(_LOG_CHUNK)
            end = file.tell()
        lines = [line for line in data.splitlines(True) if not line.startswith(_RAYS_OWN)]
        return LogPart(pid=os.getpid(), end=end, text=b"".join(lines).decode("utf-8", "replace"))


class NodeController(AtNode, ControllerHost):
    """A controller at the address of the node that Ray has put it on."""

    def __init__(self, config: RunConfig) -> None:
        configure_logging(level=logging.INFO, anew=True)
        self._at = address_at_node(config.address, node_address())
        super().__init__(config.model_copy(update={"address": self._at}))

    def serves_at(self) -> str:
        """Return where it will serve, before it does."""
        return self._at


class NodeLoader(AtNode, LoaderHost):
    """A loader worker that serves ranks at the address of its node."""

    def __init__(self, settings: WorkerSettings) -> None:
        configure_logging(level=logging.INFO, anew=True)
        if not is_loopback(settings.controller):
            settings = replace(settings, address=f"{_bracketed(node_address())}:0")
        super().__init__(settings)


def address_at_node(address: str, node: str) -> str:
    """Return the address to serve at: all addresses of a machine become the one of the node.

    Raises:
        ConfigError: it is another node's.
    """
    host, port = split_address(address)
    if is_loopback(address):
        return address
    if host in _ANY:
        return f"{_bracketed(node)}:{port}"
    if host.strip("[]") == node or not host.replace(".", "").isdigit():
        return address
    raise ConfigError(
        f"the run file's address {address} is not that of the node {node} that the controller is "
        f"on: write 0.0.0.0:{port} for whichever node it is"
    )


def node_address() -> str:
    """Return the address by which other nodes reach this one."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address.strip("[]")


def _bracketed(node: str) -> str:
    return f"[{node}]" if ":" in node else node


ControllerOnNode = ray.remote(NodeController)
LoaderOnNode = ray.remote(NodeLoader)
