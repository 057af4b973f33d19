"""Machines of a network of its own on this one: network namespaces on a bridge, each at an address.

Needs root and `ip`; a test that uses it is skipped elsewhere, and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Network:
    """A bridge that this process is on, too, at `gateway`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        # Of this process alone: several tests may run on one machine.
        self._tag = f"{os.getpid() % 100_000:05d}"
        self._subnet = f"10.{64 + os.getpid() // 250 % 64}.{os.getpid() % 250}"
        self._bridge = f"hrb{self._tag}"
        self._names: list[str] = []
        self.gateway = f"{self._subnet}.1"
        _ip("link", "add", self._bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", self._bridge)
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def add(self, name: str) -> str:
        """Add a machine; return its address."""
        number = len(self._names)
        space, outside = self._space(name), f"hrv{self._tag}{number}"
        self._names.append(name)
        _ip("netns", "add", space)
        self._stack.callback(_ip, "netns", "del", space)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", outside, "master", self._bridge, "up")
        address = f"{self._subnet}.{number + 10}"
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        _ip("-n", space, "route", "add", "default", "via", self.gateway)
        return address

    def on(self, name: str) -> list[str]:
        """Return what stands before a command that is to run on a machine."""
        return ["ip", "netns", "exec", self._space(name)]

    def cut(self, name: str) -> None:
        """Pull a machine's cable: nothing that it sends arrives, not even that it has ended."""
        _ip("link", "set", f"hrv{self._tag}{self._names.index(name)}", "down")

    def _space(self, name: str) -> str:
        return f"hr{self._tag}-{name}"


@contextmanager
def network() -> Iterator[Network]:
    """Make a network; at the end nothing of it is left. The caller ends what runs on it."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's `ip`; NOTHING WAS TESTED")
    probe = f"hrprobe{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
    except AssertionError as error:
        pytest.skip(f"this machine gives out no network namespaces; NOTHING WAS TESTED: {error}")
    with ExitStack() as stack:
        yield Network(stack)
