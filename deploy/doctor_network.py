"""Ports of Ray that others reach, and the clock."""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from deploy.doctor import Finding, verdict

RAY_PORTS = {8265: "dashboard and jobs", 6379: "GCS", 10001: "client server"}
_LISTEN = "0A"
_ASK_S = 2.0
_MAX_SKEW_S = 2.0


def examine_network(ports: dict[int, str] = RAY_PORTS) -> Iterator[Finding]:
    """Look for a Ray on this machine that lets in whoever reaches it."""
    remedy = "start Ray with RAY_AUTH_MODE=token and --dashboard-host=127.0.0.1, behind a firewall"
    open_ports = []
    for port, what in ports.items():
        beyond = [address for address in _listening(port) if not _is_loopback(address)]
        if beyond and not _asks_for_a_token(port):
            open_ports.append(f"{what} at {beyond[0]}:{port}")
    found = "; ".join(open_ports) or "nothing that answers beyond loopback without a token"
    yield verdict("Ray's ports", found, ok=not open_ports, remedy=remedy, stops=False)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _listening(port: int) -> list[str]:
    """Return the addresses of this machine at which something listens on a port."""
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == _LISTEN and int(number, 16) == port:
                # The kernel writes words of 32 bits in the machine's own order.
                words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
                packed = struct.pack(f"={len(words)}I", *words)
                found.append(socket.inet_ntop(family, packed))
    return [str(_unmapped(address)) for address in found]


def _unmapped(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def _asks_for_a_token(port: int) -> bool:
    """Say whether HTTP is refused without credentials; of Ray's gRPC ports nobody can tell.

    Where this shell has Ray's token authentication on, they are taken to have it too.
    """
    if os.environ.get("RAY_AUTH_MODE") == "token" and port != 8265:
        return True
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ASK_S)
        connection.request("GET", "/api/version")
        return connection.getresponse().status in (401, 403)
    except (OSError, http.client.HTTPException):
        return False


def examine_clock(folder: Path | None = None) -> Finding:
    """Hold this process's clock against that of the file system, which may be a server's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"now")
        file.flush()
        skew = time.time() - os.fstat(file.fileno()).st_mtime
    return verdict(
        "clock",
        f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the file system's",
        ok=abs(skew) <= _MAX_SKEW_S,
        remedy="let ntpd or chronyd set it: certificates and logs go by it",
        stops=False,
    )
