"""From when to when a certificate holds, read from its DER; nothing else of it is looked at."""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime

_SEQUENCE, _EXPLICIT_0 = 0x30, 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_PEM = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

Element = tuple[int, bytes, bytes]
"""Tag, content, and what follows."""


def validity(pem: str) -> list[tuple[datetime, datetime]]:
    """Return from when to when each certificate of a PEM file holds (RFC 5280, 4.1.2.5).

    Raises:
        ValueError: there is none, or it is damaged.
    """
    found = [_validity(_der(each)) for each in _PEM.findall(pem)]
    if not found:
        raise ValueError("holds no certificate")
    return found


def _der(pem: str) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(pem)
    except ValueError as error:
        raise ValueError("holds a damaged certificate") from error


def _validity(der: bytes) -> tuple[datetime, datetime]:
    _, certificate, _ = _element(der, _SEQUENCE)
    _, signed, _ = _element(certificate, _SEQUENCE)
    tag, _, rest = _element(signed)
    if tag == _EXPLICIT_0:  # the version, where it is not the first
        _, _, rest = _element(rest)
    for _ in range(2):  # algorithm and issuer
        _, _, rest = _element(rest, _SEQUENCE)
    _, times, _ = _element(rest, _SEQUENCE)
    first_tag, first, rest = _element(times)
    last_tag, last, _ = _element(rest)
    return _time(first_tag, first), _time(last_tag, last)


def _element(data: bytes, wanted: int | None = None) -> Element:
    """Split the first element off."""
    if len(data) < 2 or (wanted is not None and data[0] != wanted):
        raise ValueError("holds a damaged certificate")
    length, start = data[1], 2
    if length >= 0x80:
        start += length & 0x7F
        length = int.from_bytes(data[2:start], "big")
    if len(data) < start + length:
        raise ValueError("holds a damaged certificate")
    return data[0], data[start : start + length], data[start + length :]


def _time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii", errors="replace")
    if tag == _UTC_TIME:
        # Two digits of the year, of which 50 and more are of the last century.
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("holds a certificate without times")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
