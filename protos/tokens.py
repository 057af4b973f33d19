"""Tokens: secrets in files that say who may join a run and who may steer it.

A file holds a token a line, at most two: while a token is renewed, the old one and the new one. A
server takes either, a client shows the first. Tokens are compared as hashes in constant time, and
are in no message, log or `repr`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from protos.errors import AccessRefused, ConfigError, NotAuthenticated, Rejected
from protos.security import Security
from protos.watched_file import WatchedFile

HEADER = "authorization"
"""Metadata key of a call's token; its value is `Bearer TOKEN`."""

MIN_CHARS = 32
MAX_CHARS = 512
MAX_TOKENS = 2

_TOKEN = re.compile(rf"[!-~]{{{MIN_CHARS},{MAX_CHARS}}}")
_SCHEME = "Bearer "


class Right(enum.Enum):
    """What a token allows."""

    JOIN = "join"  # take part as a rank or a loader worker
    ADMIN = "admin"  # look at the run and steer it


RIGHT_OF: dict[str, frozenset[Right]] = {
    "headrace.v1.Control": frozenset({Right.JOIN}),
    "headrace.v1.Data": frozenset({Right.JOIN}),
    "headrace.v1.Admin": frozenset({Right.ADMIN}),
    "grpc.health.v1.Health": frozenset({Right.JOIN, Right.ADMIN}),
}
"""Which tokens open a service, any one of them; a service that is not here is closed to all."""


class TokenFile:
    """The tokens of a file."""

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path, _tokens_of, secret=True)

    @property
    def shown(self) -> str:
        """The token that a client shows."""
        return self._file.get()[0]

    def hashes(self) -> list[bytes]:
        """Return the hashes of the tokens that a server takes."""
        return [digest(token) for token in self._file.get()]

    def takes(self, value: str) -> bool:
        """Say whether a header of the value `Bearer TOKEN` shows one of the tokens."""
        asked = digest(value.removeprefix(_SCHEME))
        # All are compared, whichever fits: the time says nothing of which does.
        fits = [hmac.compare_digest(known, asked) for known in self.hashes()]
        return value.startswith(_SCHEME) and any(fits)


@functools.cache
def token_file(path: Path) -> TokenFile:
    """Return the file at `path`, one object a process, which outlasts a moment without the file.

    Raises:
        ConfigError: it cannot be read, others may read it, or it holds no token.
    """
    return TokenFile(path)


def bearer(token: str) -> str:
    """Return the value of `HEADER` for a token."""
    return f"{_SCHEME}{token}"


class Gatekeeper:
    """Says which calls are let in, by the token that comes with them."""

    def __init__(self, security: Security) -> None:
        """Read the tokens.

        Raises:
            ConfigError: a file holds no token, or both hold the same.
        """
        files = {Right.ADMIN: security.admin_token_file, Right.JOIN: security.join_token_file}
        # The lesser right comes last: it wins should both files come to hold one token.
        self._files = {right: token_file(path) for right, path in files.items() if path is not None}
        hashes = [known for file in self._files.values() for known in set(file.hashes())]
        if len(set(hashes)) != len(hashes):
            raise ConfigError(
                f"{security.join_token_file} and {security.admin_token_file} hold the same token: "
                "whoever may join could steer the run, so make a second one"
            )

    @property
    def lets_all_in(self) -> bool:
        """True where no token is asked for."""
        return not self._files

    def refusal(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Rejected | None:
        """Return why a call of `/service/Method` is not let in; None: it is.

        The sentences hold nothing that the caller sent.
        """
        if self.lets_all_in:
            return None
        shown = [value for key, value in metadata if key == HEADER]
        if not shown:
            return NotAuthenticated(
                "no token came with the call: name the file that holds it (--token-file, or "
                "HEADRACE_JOIN_TOKEN_FILE for ranks and workers, HEADRACE_ADMIN_TOKEN_FILE for "
                "operators)"
            )
        right = self._right_of(shown)
        if right is None:
            return NotAuthenticated(
                "the token that came with the call is not known here: it is another run's, or was "
                "renewed since"
            )
        allowed = RIGHT_OF.get(method.strip("/").partition("/")[0], frozenset())
        if right in allowed:
            return None
        needed = " or ".join(sorted(each.value for each in allowed))
        return AccessRefused(
            f"this call needs the {needed} token, and came with the {right.value} token"
            if needed
            else "this call is open to nobody"
        )

    def _right_of(self, shown: list[str | bytes]) -> Right | None:
        value = shown[0]
        if len(shown) != 1 or not isinstance(value, str) or not value.startswith(_SCHEME):
            return None
        return self.right_of(digest(value.removeprefix(_SCHEME)))

    def right_of(self, asked: bytes) -> Right | None:
        """Return what the token of a `digest` allows now; None: it is not known, or no more."""
        found = None
        for right, file in self._files.items():
            for known in file.hashes():
                # All are compared, whichever fits: the time says nothing of which does.
                found = right if hmac.compare_digest(known, asked) else found
        return found


def digest(token: str) -> bytes:
    """Return what is kept of a token to compare it."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _tokens_of(data: bytes) -> tuple[str, ...]:
    tokens = tuple(line.strip() for line in data.decode("latin-1").splitlines() if line.strip())
    if not 1 <= len(tokens) <= MAX_TOKENS or not all(map(_TOKEN.fullmatch, tokens)):
        raise ValueError(
            f"must hold one token a line, at most {MAX_TOKENS}, each of {MIN_CHARS} to {MAX_CHARS} "
            "printable ASCII characters without spaces; `openssl rand -hex 32` makes one"
        )
    return tokens
