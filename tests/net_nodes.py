"""Machines of a network of its own on this one: network namespaces on a bridge, each at an address.

Needs root and `ip`; a test that uses it is skipped elsewhere, and says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _needed(tool: str, package: str) -> str:
    """Return a tool; skips the test where there is none, and says so."""
    if shutil.which(tool) is None:
        pytest.skip(f"`{tool}` is not there (apt-get install {package}); NOTHING WAS TESTED")
    return tool


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
        self._names.append(name)
        space, outside = self._space(name), self._outside(name)
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
        _ip("link", "set", self._outside(name), "down")

    def lose(self, name: str, share: float) -> None:
        """Have so many of a machine's packets vanish, both those that it gets and that it sends."""
        iptables = _needed("iptables", "iptables")
        odds = ["-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
        try:
            for chain, device in (("INPUT", "-i"), ("OUTPUT", "-o")):
                _run(*self.on(name), iptables, "-w", "-A", chain, device, "eth0", *odds)
        except AssertionError as error:
            pytest.skip(f"this kernel loses no packets on purpose; NOTHING WAS TESTED: {error}")

    def let_vanish(self, name: str, *which: str) -> None:
        """Have a machine's packets that iptables' options choose vanish, without being counted."""
        iptables = _needed("iptables", "iptables")
        _run(*self.on(name), iptables, "-w", "-A", "OUTPUT", "-o", "eth0", *which, "-j", "DROP")

    def lose_no_more(self, name: str) -> int:
        """Have all packets arrive again; return how many have vanished meanwhile."""
        num_lost = 0
        for chain in ("INPUT", "OUTPUT"):
            listed = _run(*self.on(name), "iptables", "-w", "-nvxL", chain)
            # That of `lose` is the last one.
            num_lost += int(re.findall(r"^ *(\d+) .* DROP ", listed, re.M)[-1])
            _run(*self.on(name), "iptables", "-w", "-F", chain)
        return num_lost

    def slow_down(self, name: str, rate: str) -> None:
        """Let a machine send and receive no more than `rate`, as `tc` writes it: `1mbit`."""
        tc = _needed("tc", "iproute2")
        shaped = ["root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms"]
        try:
            _run(tc, "qdisc", "add", "dev", self._outside(name), *shaped)
            _run(*self.on(name), tc, "qdisc", "add", "dev", "eth0", *shaped)
        except AssertionError as error:
            pytest.skip(f"this kernel slows no link down; NOTHING WAS TESTED: {error}")

    def slow_no_more(self, name: str) -> int:
        """Give a machine its whole speed back; return how many packets had to wait meanwhile."""
        num_held = 0
        for on, device in (([], self._outside(name)), (self.on(name), "eth0")):
            shown = _run(*on, "tc", "-s", "qdisc", "show", "dev", device, "root")
            num_held += int(re.findall(r"overlimits (\d+)", shown)[0])
            _run(*on, "tc", "qdisc", "del", "dev", device, "root")
        return num_held

    def _outside(self, name: str) -> str:
        """Return a machine's end of its cable on the bridge."""
        return f"hrv{self._tag}{self._names.index(name)}"

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
