"""Documents on their way into shards: what is taken, what is left out, and how long one may be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MIN_CHARACTERS = 200
"""Shorter texts say too little to learn from."""

MAX_CHARACTERS = 1 << 20
"""A longer document of the user's own data is cut into parts."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and where it came from."""

    text: str
    origin: str


def in_parts(document: Document, *, max_characters: int = MAX_CHARACTERS) -> Iterator[Document]:
    """Yield the document in parts of at most `max_characters`, cut at line ends where there are."""
    text = document.text
    if len(text) <= max_characters:
        yield document
        return
    start, part = 0, 0
    while start < len(text):
        end = min(start + max_characters, len(text))
        if end < len(text):
            line_end = text.rfind("\n", start + max_characters // 2, end)
            end = line_end + 1 if line_end >= 0 else end
        yield Document(text[start:end], f"{document.origin}#{part}")
        start, part = end, part + 1


class Sieve:
    """Drops texts that are too short and texts that were seen before; counts both."""

    def __init__(self, *, min_characters: int = MIN_CHARACTERS) -> None:
        self._min_characters = min_characters
        self._seen: set[bytes] = set()
        self.num_short = 0
        self.num_duplicates = 0

    def keep(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents that are worth having, in their order."""
        for document in documents:
            if len(document.text.strip()) < self._min_characters:
                self.num_short += 1
                continue
            digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
            if digest in self._seen:
                self.num_duplicates += 1
                continue
            self._seen.add(digest)
            yield document
