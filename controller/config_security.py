"""The `security` section of a run file: which files guard the controller's port."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, model_validator

from controller.config_section import Section
from protos.security import Security

Absolute = Annotated[Path, AfterValidator(Path.absolute)]
"""A path looked up from where the command is started, wherever it is used."""


class TlsSection(Section):
    """PEM files; they are read again when they change."""

    cert: Absolute
    """The controller's certificate, followed by those between it and its authority."""

    key: Absolute
    ca: Absolute | None = None
    """The authority of `cert`, for what `headrace run` starts; None: `cert` is its own."""

    client_ca: Absolute | None = None
    """Authorities that must vouch for whoever calls: mutual TLS."""

    server_name: str = ""
    """The name in `cert`, for what `headrace run` starts, where it is not that of `address`."""


class SecuritySection(Section):
    """How the controller's port is guarded. Tokens are in files, never in the run file."""

    tls: TlsSection | None = None
    join_token_file: Absolute | None = None
    """Its token lets ranks and loader workers take part."""

    admin_token_file: Absolute | None = None
    """Its token lets operators look at the run and steer it."""

    insecure: bool = False
    """Bind an address beyond this machine without encryption or credentials."""

    @model_validator(mode="after")
    def _tokens_come_in_pairs(self) -> SecuritySection:
        if (self.join_token_file is None) != (self.admin_token_file is None):
            raise ValueError(
                "join_token_file and admin_token_file go together: with one alone, either nobody "
                "could steer the run, or everybody could"
            )
        return self

    def on_the_wire(self) -> Security:
        """Return it as both ends of a connection take it."""
        tls = self.tls
        return Security(
            cert=tls.cert if tls else None,
            key=tls.key if tls else None,
            ca=(tls.ca or tls.cert) if tls else None,
            client_ca=tls.client_ca if tls else None,
            server_name=tls.server_name if tls else "",
            join_token_file=self.join_token_file,
            admin_token_file=self.admin_token_file,
            insecure=self.insecure,
        )
