"""The option `--dashboard`: the live page, asked for on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from controller.config import RunConfig
from controller.config_dashboard import DashboardSection
from deploy.ports import free_port
from protos.security import check_bind, split_address

DashboardOption = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:PORT]",
        help="Serve the live page, at 127.0.0.1:7780 if no address follows; port 0: any free one. "
        "Beyond this machine it needs the TLS and the tokens of the run file's `security`.",
    ),
]


def with_page(config: RunConfig, address: str | None) -> RunConfig:
    """Return the run with a page at `address`; None: as the run file has it.

    Raises:
        ConfigError: it is no address, or would be open to the network.
    """
    if address is None:
        return config
    split_address(address)
    check_bind(address, config.wire_security)
    hosts = config.dashboard.hosts if config.dashboard is not None else ()
    section = DashboardSection(address=address, hosts=hosts)
    return config.model_copy(update={"dashboard": section})


def with_fixed_page(config: RunConfig) -> RunConfig:
    """Choose the page's port where it is open: a controller that comes back must be found there."""
    if config.dashboard is None:
        return config
    host, port = split_address(config.dashboard.address)
    page = config.dashboard.model_copy(update={"address": f"{host}:{port or free_port(host)}"})
    return config.model_copy(update={"dashboard": page})
