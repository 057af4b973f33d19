"""The `dashboard` section of a run file: where the live page is served."""

from __future__ import annotations

import socket

from controller.config_section import Address, Section
from protos.security import Security, split_address

DEFAULT_ADDRESS = "127.0.0.1:7780"


class DashboardSection(Section):
    """Where the live page is served. `security` guards it like the controller's port."""

    address: Address = DEFAULT_ADDRESS
    """`host:port`; port 0 takes any free one."""

    hosts: tuple[str, ...] = ()
    """Names under which browsers come, beside this machine's own, e.g. those of a proxy."""

    def url(self, security: Security, port: int | None = None) -> str:
        """Return where a browser finds the page; `port` is the real one where that was open."""
        host, named = split_address(self.address)
        if security.server_name:
            host = security.server_name
        elif host in ("0.0.0.0", "[::]"):
            host = socket.gethostname()
        return f"{'https' if security.serves_tls else 'http'}://{host}:{port or named}/"
