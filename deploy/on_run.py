"""Commands about a live run: its address, the operator's token and certificates, the connection."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from controller.config import load_run_file
from deploy.runfile import ADDRESS
from protos.client import AdminClient
from protos.errors import ConfigError, HeadraceError
from protos.security import Security, split_address

P = ParamSpec("P")

_Command = Callable[Concatenate[AdminClient, P], None]

_PANEL = "Security (files; secrets themselves are in no option and in no variable)"


def _file(option: str, variable: str, text: str) -> Any:
    choice = typer.Option(
        option, envvar=variable, metavar="FILE", help=text, rich_help_panel=_PANEL
    )
    return Annotated[Path | None, choice]


_INSECURE = typer.Option(
    "--insecure",
    help="Show the token to an address beyond loopback without TLS.",
    rich_help_panel=_PANEL,
)
_SERVER_NAME = typer.Option(
    "--server-name",
    envvar="HEADRACE_SERVER_NAME",
    rich_help_panel=_PANEL,
    help="The name in the controller's certificate, where it is not that of the address.",
)

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "token_file": (
        _file("--token-file", "HEADRACE_ADMIN_TOKEN_FILE", "Holds the run's admin token."),
        None,
    ),
    "ca": (_file("--ca", "HEADRACE_CA", "Authorities of the controller's certificate: TLS."), None),
    "cert": (_file("--cert", "HEADRACE_CERT", "Your certificate, for mutual TLS."), None),
    "key": (_file("--key", "HEADRACE_KEY", "Its key."), None),
    "server_name": (Annotated[str, _SERVER_NAME], ""),
    "insecure": (Annotated[bool, _INSECURE], False),
}
"""Of each parameter that every such command has: type and default."""

_ADDRESS = Annotated[
    str,
    typer.Argument(
        help="HOST:PORT of the controller, a run's folder, its run file, or the name of a run on "
        "the Ray cluster that RAY_ADDRESS names. A run file also says which token and which "
        "authority, where the options do not."
    ),
]


def find_controller(address: str) -> str:
    """Return HOST:PORT of a controller, from a run's folder, its run file or its name.

    Raises:
        ConfigError: nothing is served from that folder now, or there is no such run.
    """
    given = Path(address)
    if given.is_dir():
        try:
            return _address_in(given)
        except OSError:
            raise ConfigError(
                f"no controller serves the run in {given} now (there is no {ADDRESS} in it); name "
                "HOST:PORT if it was started by hand"
            ) from None
    run = name_of_run(address)
    if given.is_file():
        config = load_run_file(given)
        with contextlib.suppress(OSError):
            return _address_in(config.out)
        # On a cluster the run's folder may not be seen from here; without one it was started by
        # hand, and serves where its file says.
        if not os.environ.get("RAY_ADDRESS"):
            return _called(config.address, source=given)
    elif ":" in address:
        return address
    return _on_cluster(run or address)


def _called(address: str, *, source: Path) -> str:
    """Return the address that a controller is to serve, if it can be called by that."""
    host, port = split_address(address)
    if port == 0 or host in ("0.0.0.0", "[::]"):
        raise ConfigError(
            f"{source} has address {address}, which does not say where to call: name HOST:PORT, or "
            "set RAY_ADDRESS if the run is on a Ray cluster"
        )
    return address


def _address_in(folder: Path) -> str:
    return (folder / ADDRESS).read_text(encoding="utf-8").strip()


def _on_cluster(run: str) -> str:
    neither = f"{run!r} is neither HOST:PORT nor the folder or file of a run"
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(f"{neither}; a run on a Ray cluster is found where RAY_ADDRESS is set")
    # Slow to import, and needed where nothing else says it.
    from deploy.cluster import keeper_state
    from deploy.cluster_connection import on_cluster

    try:
        with on_cluster(None, run=run):
            return str(keeper_state(run).address)
    except HeadraceError as error:
        raise ConfigError(f"{neither}, and not found on a Ray cluster: {error}") from error


def name_of_run(run: str | None) -> str | None:
    """Return the name of a run that is given by name or by its run file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if run is None or not (run.endswith((".yaml", ".yml")) or Path(run).is_file()):
        return run
    return load_run_file(Path(run)).run


def _security(address: str, options: Mapping[str, Any]) -> Security:
    """Return what the options say; what they do not say, by the run file if one was named."""
    given = {**options, "admin_token_file": options["token_file"]}
    del given["token_file"]
    if Path(address).is_file():
        filed = load_run_file(Path(address)).wire_security
        if given["ca"] is None and given["cert"] is None:
            given |= {"ca": filed.ca, "server_name": given["server_name"] or filed.server_name}
            if filed.client_ca is not None:
                given |= {"cert": filed.cert, "key": filed.key}
        given["admin_token_file"] = given["admin_token_file"] or filed.admin_token_file
        given["insecure"] = given["insecure"] or filed.insecure
    return Security(**given)


def on_run(
    *, default: str | None = None, num_before: int = 0
) -> Callable[[_Command[P]], Callable[..., None]]:
    """Give a command the address of a run and the security options in place of its connection.

    The command's first argument is the open connection. `default` is the address where none is
    given; None: it must be. `num_before` of the command's arguments come before the address.
    """
    return functools.partial(_connecting, default=default, num_before=num_before)


def _connecting(
    command: _Command[P], *, default: str | None, num_before: int
) -> Callable[..., None]:
    @functools.wraps(command)
    def connected(address: str, *args: P.args, **kwargs: P.kwargs) -> None:
        options: dict[str, Any] = {name: kwargs.pop(name) for name in _OPTIONS}
        security = _security(address, options)
        with closing(AdminClient(find_controller(address), security=security)) as admin:
            command(admin, *args, **kwargs)

    _, *others = inspect.signature(command, eval_str=True).parameters.values()
    named = inspect.Parameter.KEYWORD_ONLY
    address = inspect.Parameter(
        "address",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=inspect.Parameter.empty if default is None else default,
        annotation=_ADDRESS,
    )
    ours = [
        inspect.Parameter(name, named, default=value, annotation=kind)
        for name, (kind, value) in _OPTIONS.items()
    ]
    parameters = [*others[:num_before], address, *others[num_before:], *ours]
    # The command line is made of these two.
    connected.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    connected.__annotations__ = {each.name: each.annotation for each in parameters}
    return connected
