"""Who may talk to whom: the files by which a process guards its port and shows who it is."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from protos.errors import ConfigError

_ENVIRONMENT = {
    "ca": "HEADRACE_CA",
    "cert": "HEADRACE_CERT",
    "key": "HEADRACE_KEY",
    "join_token_file": "HEADRACE_JOIN_TOKEN_FILE",
    "admin_token_file": "HEADRACE_ADMIN_TOKEN_FILE",
}
_SERVER_NAME = "HEADRACE_SERVER_NAME"


@dataclass(frozen=True, kw_only=True, slots=True)
class Security:
    """How a process guards its port and shows who it is.

    Paths only, to PEM files and token files: secrets themselves are nowhere that a `repr`, a log
    or a pickle would show. All files are read again when they change.
    """

    ca: Path | None = None
    """Authorities that vouch for the servers it calls. None: its calls are not encrypted."""

    cert: Path | None = None
    """Its own certificate, followed by those between it and the authority."""

    key: Path | None = None
    client_ca: Path | None = None
    """Authorities that must vouch for whoever calls it: mutual TLS."""

    server_name: str = ""
    """The name that the certificates of the servers it calls carry; empty: that of the address."""

    join_token_file: Path | None = None
    """Who has this token may take part as a rank or a loader worker."""

    admin_token_file: Path | None = None
    """Who has this token may look at the run and steer it."""

    insecure: bool = False
    """Serve or call addresses beyond loopback without encryption or tokens."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a certificate and its key go together: give both, or neither")
        if self.client_ca is not None and self.cert is None:
            raise ConfigError("mutual TLS (client_ca) needs a certificate and a key of its own")

    @property
    def serves_tls(self) -> bool:
        """Whether its port is encrypted."""
        return self.cert is not None

    @property
    def calls_tls(self) -> bool:
        """Whether its calls are encrypted."""
        return self.ca is not None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Security:
        """Return what the HEADRACE_ variables name: paths, never secrets.

        Raises:
            ConfigError: a certificate is named without its key.
        """

        def path(field: str) -> Path | None:
            value = environment.get(_ENVIRONMENT[field])
            return Path(value) if value else None

        return cls(
            ca=path("ca"),
            cert=path("cert"),
            key=path("key"),
            server_name=environment.get(_SERVER_NAME, ""),
            join_token_file=path("join_token_file"),
            admin_token_file=path("admin_token_file"),
        )

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which a process that calls reads the same.

        Empty where there is nothing to name, so that none is inherited from elsewhere.
        """
        paths = {name: getattr(self, field) for field, name in _ENVIRONMENT.items()}
        named = {name: str(path) if path is not None else "" for name, path in paths.items()}
        return {**named, _SERVER_NAME: self.server_name}


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port`.

    Raises:
        ConfigError: it is not one.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"an address must be HOST:PORT with a port of 0..65535, got {address!r}")
    return host, int(port)


def is_loopback(address: str) -> bool:
    """Say whether `host:port` is on this machine for certain.

    Raises:
        ConfigError: it is not an address.
    """
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(address: str, security: Security) -> None:
    """Refuse to serve the network in the clear, or whoever calls, unless that was asked for.

    Raises:
        ConfigError: the address is not loopback, and TLS or a join token is missing.
    """
    guarded = security.serves_tls and security.join_token_file is not None
    if not (is_loopback(address) or guarded or security.insecure):
        raise ConfigError(
            f"binding {address} would let anyone who reaches it take part in the run or steer it: "
            "bind 127.0.0.1, or set up security.tls and token files, or set security.insecure "
            "(--insecure) if the network is trusted"
        )


def check_call(address: str, security: Security, token_file: Path | None) -> None:
    """Refuse to send a token through the network in the clear unless that was asked for.

    Raises:
        ConfigError: the address is not loopback, and calls are not encrypted.
    """
    if token_file is None or security.calls_tls or security.insecure or is_loopback(address):
        return
    raise ConfigError(
        f"calling {address} without TLS would show the token of {token_file} to the network: name "
        "the authority of its certificate (--ca, or HEADRACE_CA), or set insecure if the network "
        "is trusted"
    )
