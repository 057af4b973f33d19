"""What would stop a run on this machine: measured, not guessed, each with a remedy."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from protos.errors import ConfigError
from protos.security import split_address

_PACKAGES = {
    "server": ("grpcio", "numpy", "protobuf", "pyarrow", "pydantic", "ray", "tokenizers", "torch"),
    "local": ("matplotlib", "transformers"),
}
_LOWEST = re.compile(r"(?P<name>[\w-]+)(?:\[[\w,]*\])?>=(?P<version>[\d.]+)")
_MIN_SHM_BYTES = 128 << 20
_MIN_FILES = 1024
_MIN_MEMORY_BYTES = 3 << 30
_MIN_DISK_BYTES = 1 << 30
_MAX_SOCKET_PATH = 107
_RAY_SOCKET_SUFFIX = len("/hr-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/") + 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that was looked at."""

    what: str
    found: str
    ok: bool
    stops: bool = False
    """It would stop a run, rather than slow it down."""

    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def examine_machine(address: str) -> list[Finding]:
    """Look at what a run needs; `address` is where the controller is to serve."""
    return [
        _python(),
        *_packages(),
        _versions(),
        examine_port("port", address),
        _shared_memory(),
        _open_files(),
        _socket_path(),
        _memory(),
        _disk(),
        _cores(),
    ]


def verdict(what: str, found: str, *, ok: bool, remedy: str, stops: bool = True) -> Finding:
    """Return a finding; `remedy` and `stops` count if it is not `ok`."""
    return Finding(
        what=what, found=found, ok=ok, stops=stops and not ok, remedy="" if ok else remedy
    )


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return verdict(
        "Python", version, ok=sys.version_info >= (3, 11), remedy="use Python 3.11 or newer"
    )


def _packages() -> Iterator[Finding]:
    for extra, names in _PACKAGES.items():
        versions = {name: _version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        yield verdict(
            f"packages of headrace[{extra}]",
            ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
            ok=not missing,
            remedy=f"pip install 'headrace[{extra}]'",
        )


def _versions() -> Finding:
    """Hold what is installed against the lowest versions that Headrace's own metadata names."""
    try:
        requires = importlib.metadata.requires("headrace") or []
    except importlib.metadata.PackageNotFoundError:
        return verdict("versions", "headrace runs from its sources", ok=True, remedy="")
    return judge_versions(requires)


def judge_versions(requires: Iterable[str]) -> Finding:
    """Say which packages are older than `NAME>=VERSION` asks; others than ours do not count."""
    ours = {name for names in _PACKAGES.values() for name in names}
    old = set()
    for each in requires:
        found = _LOWEST.match(each)
        if found is None or found["name"] not in ours:
            continue
        version = _version(found["name"])
        if version is not None and _numbers(version) < _numbers(found["version"]):
            old.add(f"{found['name']} {version} (needed: {found['version']})")
    return verdict(
        "versions",
        ", ".join(sorted(old)) or "all new enough",
        ok=not old,
        remedy="pip install --upgrade 'headrace[local]'",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_port(what: str, address: str) -> Finding:
    """Say whether a port can be bound."""
    try:
        host, port = split_address(address)
    except ConfigError as error:
        return verdict(what, str(error), ok=False, remedy="give --address HOST:PORT")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
    except OSError as error:
        remedy = "stop what serves there, or set another `address` (port 0: any free one)"
        return verdict(what, f"{address}: {error.strerror}", ok=False, remedy=remedy)
    return verdict(what, f"{address} is free", ok=True, remedy="")


def _shared_memory() -> Finding:
    try:
        num_bytes = shutil.disk_usage("/dev/shm").free
    except OSError:
        num_bytes = 0
    return verdict(
        "/dev/shm",
        f"{say_size(num_bytes)} free",
        ok=num_bytes >= _MIN_SHM_BYTES,
        remedy=f"Ray wants {say_size(_MIN_SHM_BYTES)}; in a container: --shm-size=1g",
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    return verdict(
        "open files",
        f"{soft}, may be raised to {limit}",
        ok=hard == resource.RLIM_INFINITY or hard >= _MIN_FILES,
        remedy=f"raise the hard limit to {_MIN_FILES} or more (ulimit -Hn)",
    )


def _socket_path() -> Finding:
    base = tempfile.gettempdir()
    length = len(os.fsencode(base)) + _RAY_SOCKET_SUFFIX
    # The harness falls back to /tmp by itself.
    fallback = os.access("/tmp", os.W_OK)
    return verdict(
        "socket paths",
        f"{length} of {_MAX_SOCKET_PATH} bytes below {base}",
        ok=length <= _MAX_SOCKET_PATH or fallback,
        remedy="set TMPDIR to a folder with a shorter name",
    )


def _memory() -> Finding:
    available = _available_memory(Path("/proc/meminfo").read_text().splitlines())
    return verdict(
        "memory",
        f"{say_size(available)} available",
        ok=available >= _MIN_MEMORY_BYTES,
        remedy=f"a local run with the tiny model wants about {say_size(_MIN_MEMORY_BYTES)}",
        stops=False,
    )


def _available_memory(lines: Iterable[str]) -> int:
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return verdict(
        "disk",
        f"{say_size(free)} free in {Path.cwd()}",
        ok=free >= _MIN_DISK_BYTES,
        remedy=f"a run's folder wants about {say_size(_MIN_DISK_BYTES)}; give --out elsewhere",
        stops=False,
    )


def _cores() -> Finding:
    num_cores = len(os.sched_getaffinity(0))
    return verdict(
        "cores",
        str(num_cores),
        ok=num_cores >= 2,
        remedy="with one core, ranks and workers take turns: give --ranks 1 --workers 1",
        stops=False,
    )


def say_size(num_bytes: int) -> str:
    """Write a number of bytes for a person."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes >> 20} MiB"


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print a line for each finding, and the remedies."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "what", "found", "remedy"):
        table.add_column(name)
    for finding in findings:
        mark = "[green]ok" if finding.ok else ("[red]stop" if finding.stops else "[yellow]slow")
        # As Text: an extra's name in brackets would be taken for a style.
        table.add_row(mark, *map(Text, (finding.what, finding.found, finding.remedy)))
    console.print(table)
