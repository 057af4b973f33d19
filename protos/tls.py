"""TLS for both ends, from files that are read again when they change."""

from __future__ import annotations

import functools
import logging
import ssl
from pathlib import Path

import grpc

from protos.errors import ConfigError
from protos.security import Security
from protos.watched_file import WatchedFile

logger = logging.getLogger(__name__)

Pems = tuple[bytes, bytes]
"""Certificate and key."""

ClientPems = tuple[bytes, Pems | tuple[None, None]]
"""A client's authorities, and its own certificate and key where it has them."""


class Identity:
    """A certificate and its key, which change together."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert = WatchedFile(cert, _certificates)
        self._key = WatchedFile(key, bytes, secret=True)
        self._check()
        self._pems = self._tried = (self._cert.get(), self._key.get())

    def pems(self) -> Pems:
        """Return the newest pair that belongs together."""
        pems = (self._cert.get(), self._key.get())
        # The one file is replaced before the other: such a pair is looked at again and again.
        if pems != self._pems:
            try:
                self._check()
                self._pems = pems
            except ConfigError as error:
                if pems != self._tried:
                    logger.warning("%s; the pair before stays in force", error)
            self._tried = pems
        return self._pems

    def _check(self) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # A password would be asked for on the terminal.
            context.load_cert_chain(self._cert.path, self._key.path, password="")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ConfigError(
                f"{self._key.path} is not the key of {self._cert.path}, or needs a password "
                f"({reason})"
            ) from None


@functools.cache
def identity(cert: Path, key: Path) -> Identity:
    """Return the pair at these paths, one object a process.

    Raises:
        ConfigError: a file cannot be read, or they do not belong together.
    """
    return Identity(cert, key)


@functools.cache
def authorities(path: Path) -> WatchedFile[bytes]:
    """Return the authorities' certificates at a path, one object a process.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    return WatchedFile(path, _certificates)


def server_credentials(security: Security) -> grpc.ServerCredentials | None:
    """Return the credentials of a server, whose files are looked at before each handshake.

    None: the port is not encrypted.

    Raises:
        ConfigError: a file cannot be read, or certificate and key do not belong together.
    """
    if security.cert is None or security.key is None:
        return None
    own = identity(security.cert, security.key)
    callers = authorities(security.client_ca) if security.client_ca is not None else None

    def configuration() -> grpc.ServerCertificateConfiguration:
        cert, key = own.pems()
        roots = callers.get() if callers is not None else None
        return grpc.ssl_server_certificate_configuration([(key, cert)], roots)

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=callers is not None
    )


class ChannelFiles:
    """What a client's connections are made of; a new connection is due when it changes."""

    def __init__(self, security: Security) -> None:
        """Read the files.

        Raises:
            ConfigError: one cannot be used, or certificate and key do not belong together.
        """
        self._ca = authorities(security.ca) if security.ca is not None else None
        self._own: Identity | None = None
        if security.cert is not None and security.key is not None and self._ca is not None:
            self._own = identity(security.cert, security.key)

    def pems(self) -> ClientPems | None:
        """Return what the files hold now; None: calls are not encrypted."""
        if self._ca is None:
            return None
        return self._ca.get(), self._own.pems() if self._own is not None else (None, None)


def channel_credentials(pems: ClientPems) -> grpc.ChannelCredentials:
    """Return a client's credentials."""
    ca, (cert, key) = pems
    return grpc.ssl_channel_credentials(ca, key, cert)


def _certificates(data: bytes) -> bytes:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError):
        raise ValueError("holds no certificate in PEM form") from None
    return data
