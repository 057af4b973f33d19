"""Who may talk to whom: so far, only whether an address beyond this machine may be bound at all."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from protos.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Security:
    """How a process guards its port."""

    insecure: bool = False
    """Bind addresses beyond loopback without encryption or credentials."""


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port`.

    Raises:
        ConfigError: it is not one.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"an address must be HOST:PORT with a port of 0..65535, got {address!r}")
    return host, int(port)


def check_bind(address: str, security: Security) -> None:
    """Refuse to serve the network in the clear unless that was asked for.

    Raises:
        ConfigError: the address is not loopback and `insecure` was not given.
    """
    host, _ = split_address(address)
    if security.insecure or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"binding {address} would let anyone who reaches it steer the run: bind 127.0.0.1, or "
            "set security.insecure (--insecure) if the network is trusted"
        )
