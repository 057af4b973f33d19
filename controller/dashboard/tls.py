"""The page's TLS: the controller's own certificate, read again when it changes."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from protos.security import Security
from protos.tls import Pems, identity

logger = logging.getLogger(__name__)


def server_context(security: Security) -> ssl.SSLContext | None:
    """Return what the page's port is encrypted with; None: it is not.

    Raises:
        ConfigError: a file cannot be read, or certificate and key do not belong together.
    """
    if security.cert is None or security.key is None:
        return None
    return _Renewed(security.cert, security.key, security.client_ca).context


class _Renewed:
    """Looks at the files before each handshake."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._pems: Pems = identity(cert, key).pems()
        self._newest = self.context = self._load()
        self.context.sni_callback = self._before_handshake

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._cert, self._key, password="")
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _before_handshake(
        self, connection: ssl.SSLObject, name: str | None, former: ssl.SSLContext
    ) -> None:
        pems = identity(self._cert, self._key).pems()
        if pems != self._pems:
            try:
                self._newest, self._pems = self._load(), pems
            except (OSError, ValueError) as error:
                logger.warning("%s cannot be used now: %s", self._cert, error)
        connection.context = self._newest
