"""Ports that are free."""

from __future__ import annotations

import socket


def free_port(host: str) -> int:
    """Return a port that nobody serves at the moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host.strip("[]"), 0))
        return int(probe.getsockname()[1])
