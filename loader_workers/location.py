"""Shard URLs: an allow-list of schemes, no shell, no environment, no credentials inside.

A pattern may hold `*`, `?`, `[...]`, `**` where the store can be listed, and ranges of numbers like
`{000000..000146}` anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from protos.errors import ConfigError

REMOTE_SCHEMES = ("http", "https", "s3", "gs")
SCHEMES = ("file", *REMOTE_SCHEMES)

MAX_IN_RANGE = 1_000_000
"""Shards that one range of numbers may name."""

_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a shard is."""

    scheme: str
    authority: str
    """Host and port, or bucket; empty for a local file."""

    path: str
    """A local path, or the key below the authority, without a leading slash."""

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine."""
        return self.scheme == "file"

    @property
    def url(self) -> str:
        """The one way in which this place is written: a plain path if it is local."""
        if self.is_local:
            return self.path
        path = quote(self.path) if self.scheme in ("http", "https") else self.path
        return f"{self.scheme}://{self.authority}/{path}"


def parse_location(url: str) -> Location:
    """Return what a shard's URL names; a plain path is a local file.

    Raises:
        ConfigError: the URL has a scheme that is not read, credentials, or no path.
    """
    if ":" not in url.split("/", 1)[0]:
        return Location(scheme="file", authority="", path=url)
    scheme = url.split(":", 1)[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"shard {_shown(url)} has the scheme {scheme!r}; read are local paths and "
            f"{', '.join(f'{each}:' for each in SCHEMES)}"
        )
    if scheme in ("s3", "gs"):
        # Keys are taken as they are: `?` and `#` are characters like any other.
        authority, _, path = url.split(":", 1)[1].removeprefix("//").partition("/")
    else:
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ConfigError(f"shard {_shown(url)} is no URL: {error}") from error
        authority, path = parts.netloc, unquote(parts.path).removeprefix("/")
        if scheme != "file" and (parts.query or parts.fragment) and "?" not in path:
            raise ConfigError(
                f"shard {_shown(url)} has a query or fragment, which may hold a signature that "
                "expires and would be written down; name it without, and give credentials by "
                "the environment"
            )
    if "@" in authority:
        raise ConfigError(
            f"shard {_shown(url)} has a user or password inside; credentials come from the "
            "environment or the store's own files only"
        )
    if scheme == "file":
        if authority not in ("", "localhost"):
            raise ConfigError(f"shard {url} names the host {authority!r}; write file:///path")
        return Location(scheme="file", authority="", path=f"/{path}")
    if not authority or not path:
        raise ConfigError(f"shard {_shown(url)} must be written {scheme}://host-or-bucket/path")
    return Location(scheme=scheme, authority=authority, path=path)


def local_path(url: str) -> Path:
    """Return the path that a shard's URL names.

    Raises:
        ConfigError: the URL is not one of a local file.
    """
    location = parse_location(url)
    if not location.is_local:
        raise ConfigError(f"shard {_shown(url)} is not a local file")
    return Path(location.path)


def expand_numbers(pattern: str) -> Iterator[str]:
    """Yield what a pattern's `{000..146}` ranges stand for, in order; without any, itself.

    Raises:
        ConfigError: a range runs backwards or names too many.
    """
    found = _NUMBERS.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MAX_IN_RANGE:
        raise ConfigError(
            f"{found[0]} in {_shown(pattern)} must run upwards and name at most {MAX_IN_RANGE}"
        )
    width = len(found[1])
    for number in range(first, last + 1):
        filled = pattern[: found.start()] + f"{number:0{width}d}" + pattern[found.end() :]
        yield from expand_numbers(filled)


def has_glob(pattern: str) -> bool:
    """Say whether a pattern has to be looked up."""
    return _GLOB.search(pattern) is not None


def glob_prefix(pattern: str) -> str:
    """Return the folder below which everything lies that a pattern can match."""
    found = _GLOB.search(pattern)
    return pattern[: pattern.rfind("/", 0, found.start() if found else None) + 1]


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Return what keys a pattern matches: as in a shell, `*` stays within a folder."""
    parts = []
    for segment in pattern.split("/"):
        if segment == "**":
            parts.append("(?:[^/]+/)*")
            continue
        parts.append(_within_folder(segment) + "/")
    return re.compile("".join(parts).removesuffix("/"))


def _within_folder(segment: str) -> str:
    out, at = [], 0
    while at < len(segment):
        character = segment[at]
        end = segment.find("]", at + 2) if character == "[" else -1
        if character == "*":
            out.append("[^/]*")
        elif character == "?":
            out.append("[^/]")
        elif end > 0:
            inner = segment[at + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            out.append(f"[{'^' + inner[1:] if inner[0] == '!' else inner}]")
            at = end
        else:
            out.append(re.escape(character))
        at += 1
    return "".join(out)


def _shown(url: str) -> str:
    """Return a URL fit for a message: without user, password and query."""
    return re.sub(r"//[^/]*@", "//***@", url).split("?", 1)[0]
