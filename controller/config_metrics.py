"""The `metrics` section of a run file: where Prometheus finds the controller's figures."""

from __future__ import annotations

from pathlib import Path

from controller.config_section import Address, Section
from controller.config_security import Absolute
from protos.errors import ConfigError
from protos.security import Security, is_loopback


class MetricsSection(Section):
    """An HTTP endpoint, `/metrics`, in the text formats of Prometheus and OpenMetrics."""

    address: Address | None = None
    """`host:port`; port 0 takes any free one. None: there is no endpoint."""

    token_file: Absolute | None = None
    """Its token lets Prometheus read the figures, and nothing else. None: the admin token does,
    where there is one."""

    def token_of(self, security: Security) -> Path | None:
        """Return the file of the token that is asked for; None: whoever reaches it may read."""
        return self.token_file or security.admin_token_file


def check_scraping(metrics: MetricsSection, security: Security) -> None:
    """Refuse to show the figures to a network in the clear, unless that was asked for.

    Raises:
        ConfigError: the address is not loopback, and TLS or a token is missing.
    """
    address = metrics.address
    if address is None or is_loopback(address) or security.insecure:
        return
    if not security.serves_tls or metrics.token_of(security) is None:
        raise ConfigError(
            f"metrics at {address} would show the run to anyone who reaches it: bind 127.0.0.1, or "
            "set up security.tls and metrics.token_file, or set security.insecure (--insecure) if "
            "the network is trusted"
        )
