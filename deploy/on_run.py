"""Commands about a live run: its address, the operator's token and certificates, the connection."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from deploy.runfile import ADDRESS
from protos.client import AdminClient
from protos.errors import ConfigError
from protos.security import Security

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
    str, typer.Argument(help="HOST:PORT of the controller, or the folder of a `headrace run`.")
]


def find_controller(address: str) -> str:
    """Return HOST:PORT of a controller, read from the run's folder if one is named.

    Raises:
        ConfigError: nothing is served from that folder now.
    """
    folder = Path(address)
    if not folder.is_dir():
        return address
    try:
        return (folder / ADDRESS).read_text(encoding="utf-8").strip()
    except OSError:
        raise ConfigError(
            f"no controller serves the run in {folder} now (there is no {ADDRESS} in it); name "
            "HOST:PORT if it was started by hand"
        ) from None


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
        security = Security(admin_token_file=options.pop("token_file"), **options)
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
