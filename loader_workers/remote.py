"""Shards in object stores and on web servers, read in ranges by one library (obstore).

What may pass is tried again with jittered waits within a budget of time; what will not pass is the
shard's fault and says why. A shard must stay what it was when it was opened: its size and its
ETag are held against every answer.
"""

from __future__ import annotations

import configparser
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import GCSStore, HTTPStore, S3Store

from loader_workers.location import Location, glob_prefix, glob_regex
from protos.errors import ConfigError, DomainEmpty, NotReady, ShardUnreadable
from protos.retry import Retry

logger = logging.getLogger(__name__)

T = TypeVar("T")
Store = S3Store | GCSStore | HTTPStore

_GONE = (
    FileNotFoundError,
    exceptions.NotFoundError,
    exceptions.NotSupportedError,
    exceptions.InvalidPathError,
)
_REFUSED = (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteSettings:
    """How remote shards are read."""

    chunk_bytes: int = 8 << 20
    """Of one request."""

    request_timeout_s: float = 30.0
    budget_s: float = 60.0
    """How long one request is tried again before the store counts as unreachable."""

    retry: Retry = field(default_factory=lambda: Retry(first_wait_s=0.2, max_wait_s=10.0))


class _Short(Exception):
    """An answer had fewer or other bytes than asked for; may pass."""


class Remote:
    """The stores that this process reads from. Thread-safe; connections are kept and shared."""

    def __init__(self, settings: RemoteSettings | None = None) -> None:
        self.settings = settings or RemoteSettings()
        self._stores: dict[tuple[str, str], Store] = {}
        self._lock = threading.Lock()
        self._num_retries = 0

    @property
    def num_retries(self) -> int:
        """How many requests were made again so far."""
        return self._num_retries

    def open(self, location: Location) -> RemoteObject:
        """Look a shard up.

        Raises:
            ShardUnreadable: there is none.
            NotReady: its store cannot be reached, or refuses the credentials.
        """
        store = self._store(location)
        meta = self.trying(location.url, lambda: obstore.head(store, location.path))
        return RemoteObject(self, store, location, size=meta["size"], etag=meta["e_tag"])

    def list(self, location: Location) -> list[Location]:
        """Return what a pattern matches, sorted.

        Raises:
            ConfigError: a web server cannot be listed.
            NotReady: the store cannot be reached, or refuses the credentials.
        """
        if location.scheme in ("http", "https"):
            raise ConfigError(
                f"{location.url}: a web server cannot be listed; name the shards, with a range "
                "like {000000..000146} if they are numbered"
            )
        store = self._store(location)
        prefix, matches = glob_prefix(location.path), glob_regex(location.path).fullmatch

        def keys() -> list[str]:
            pages = obstore.list(store, prefix.rstrip("/") or None)
            return [meta["path"] for page in pages for meta in page if matches(meta["path"])]

        try:
            found = self.trying(location.url, keys)
        except ShardUnreadable as error:
            raise DomainEmpty(str(error)) from error
        return [
            Location(scheme=location.scheme, authority=location.authority, path=key)
            for key in sorted(found)
        ]

    def trying(self, url: str, call: Callable[[], T]) -> T:
        """Make a call until it succeeds, its budget is spent, or it will never succeed."""
        settings = self.settings
        give_up_at = time.monotonic() + settings.budget_s
        num_tries = 0
        while True:
            try:
                return call()
            except _GONE as error:
                raise ShardUnreadable(f"{url}: {_first_line(error)}") from error
            except (exceptions.BaseError, OSError, _Short) as error:
                num_tries += 1
                wait_s = settings.retry.wait_s(num_tries)
                # Credentials that were refused may have been renewed meanwhile, but only just.
                refused = isinstance(error, _REFUSED) and num_tries >= 3
                if refused or time.monotonic() + wait_s > give_up_at:
                    raise NotReady(
                        f"cannot read {url} now, after {num_tries} tries: {_first_line(error)}"
                    ) from error
                logger.info("again url=%s tries=%d: %s", url, num_tries, _first_line(error))
                with self._lock:
                    self._num_retries += 1
            time.sleep(wait_s)

    def _store(self, location: Location) -> Store:
        key = (location.scheme, location.authority)
        with self._lock:
            if key not in self._stores:
                self._stores[key] = self._make(location)
            return self._stores[key]

    def _make(self, location: Location) -> Store:
        client: Any = {
            "timeout": f"{int(self.settings.request_timeout_s * 1000)}ms",
            "connect_timeout": "5s",
            # Also keeps a redirect from leading away from an encrypted connection.
            "allow_http": location.scheme == "http"
            or (location.scheme == "s3" and _aws_endpoint().startswith("http:"))
            or (location.scheme == "gs" and _gcs_emulator().startswith("http:")),
        }
        # Trying again is ours alone: it has one budget, and is counted.
        retry: Any = {"max_retries": 0}
        try:
            if location.scheme == "s3":
                options: Any = _aws_profile()
                if _aws_endpoint():
                    options["endpoint"] = _aws_endpoint()
                return S3Store(
                    location.authority, client_options=client, retry_config=retry, **options
                )
            if location.scheme == "gs":
                options = {"service_account_key": _emulated_account()} if _gcs_emulator() else {}
                return GCSStore(
                    location.authority, client_options=client, retry_config=retry, **options
                )
            base = f"{location.scheme}://{location.authority}"
            return HTTPStore.from_url(base, client_options=client, retry_config=retry)
        except exceptions.BaseError as error:
            raise ConfigError(f"cannot open {location.url}: {_first_line(error)}") from error


class RemoteObject:
    """One shard as it was when it was opened."""

    def __init__(
        self, remote: Remote, store: Store, location: Location, *, size: int, etag: str | None
    ) -> None:
        self._remote = remote
        self._store = store
        self._location = location
        self._etag = etag
        self.num_bytes = size
        self.stamp = f"{size}:{etag}" if etag else ""
        """Changes when the shard does; empty: nobody can say."""

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Return the bytes from `offset` on; fewer only at the end.

        Raises:
            ShardUnreadable: the shard is not what it was when it was opened, or gone.
            NotReady: the store cannot be reached.
        """
        end = min(offset + num_bytes, self.num_bytes)
        if offset >= end:
            return b""
        return self._remote.trying(self._location.url, lambda: self._get(offset, end))

    def _get(self, start: int, end: int) -> bytes:
        # Not suffixed by an If-Match: plain web servers ignore it, and answers tell their ETag.
        got = obstore.get(self._store, self._location.path, options={"range": (start, end)})
        if got.meta["size"] != self.num_bytes or got.meta["e_tag"] != self._etag:
            raise ShardUnreadable(
                f"{self._location.url} changed while it was read: it had {self.num_bytes} bytes "
                f"and ETag {self._etag}, now {got.meta['size']} and {got.meta['e_tag']}"
            )
        if tuple(got.range) != (start, end):
            raise _Short(f"bytes {tuple(got.range)} came, {(start, end)} were asked for")
        data = bytes(got.bytes())
        if len(data) != end - start:
            raise _Short(f"{len(data)} bytes came, {end - start} were asked for")
        return data


def _aws_endpoint() -> str:
    """Return where S3 is, if the user's environment says: then it may be an unencrypted place."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _gcs_emulator() -> str:
    """Return where Google's storage is emulated, by the variable that its own libraries read."""
    where = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return f"http://{where}" if where and "://" not in where else where


def _emulated_account() -> str:
    """Return an account of nobody, at the emulator: it is shown no credentials."""
    nobody = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    return json.dumps({**nobody, "gcs_base_url": _gcs_emulator(), "disable_oauth": True})


def _aws_profile() -> dict[str, str]:
    """Return the keys of the user's AWS profile, if the environment names none.

    The library reads the environment and the machine's own role, not this file.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(Path(path).expanduser(), encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be read as AWS credentials") from error
    profile = os.environ.get("AWS_PROFILE", "default")
    if profile not in parser:
        return {}
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
    }
    return {ours: parser[profile][name] for name, ours in names.items() if name in parser[profile]}


def _first_line(error: Exception) -> str:
    """Return what went wrong without the library's dump of its own state."""
    return " ".join(str(error).split("\n\nDebug source:", 1)[0].split())[:500]


REMOTE = Remote()
"""The stores of this process, with default settings."""
