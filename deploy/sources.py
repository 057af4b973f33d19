"""Folders of text or of shards, as users have them, found and read with clear errors.

What counts as a domain below DIR:

    DIR/domain/*.txt                   a file is a document
    DIR/domain/*.jsonl, *.jsonl.zst    a line is a document: an object with a text field
    DIR/domain.jsonl, DIR/domain.jsonl.zst
    DIR/domain/*.tar, *.tar.gz, *.tgz, *.tar.zst   webdataset shards, used as they are
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import zstandard

from deploy.documents import Document, in_parts
from loader_workers.streams import ENDINGS as SHARD_ENDINGS
from protos.errors import ConfigError, DataError

_TEXT_ENDINGS = (".txt", ".jsonl", ".jsonl.zst")

MAX_TEXT_FILE_BYTES = 256 << 20
"""A .txt file is read whole; a larger one belongs into a .jsonl."""

MAX_LINE_CHARACTERS = 64 << 20


@dataclass(frozen=True, slots=True)
class TextDomain:
    """A domain whose documents still have to be packed."""

    name: str
    files: tuple[Path, ...]

    def documents(self, *, text_field: str) -> Iterator[Document]:
        """Yield the documents, file after file; very long ones in parts.

        Raises:
            DataError: a file cannot be read or a line is not what it should be; says which.
        """
        for path in self.files:
            for document in _read(path, text_field):
                yield from in_parts(document)


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a domain, read anew each time; goes to another process as it is."""

    domain: TextDomain
    text_field: str

    def __iter__(self) -> Iterator[Document]:
        return self.domain.documents(text_field=self.text_field)


@dataclass(frozen=True, slots=True)
class ShardDomain:
    """A domain that is packed already."""

    name: str
    shards: tuple[Path, ...]


def find_domains(folder: Path) -> dict[str, TextDomain | ShardDomain]:
    """Return the domains below `folder`, by name.

    Raises:
        ConfigError: there is no such folder, it holds no domain, or a domain is ambiguous.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one that holds a folder for each domain")
    domains: dict[str, TextDomain | ShardDomain] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        found = _domain_of(entry)
        if found is None:
            continue
        if found.name in domains:
            raise ConfigError(
                f"domain {found.name!r} is in {folder} both as a folder and as a file, or as two "
                "files; keep one of them"
            )
        domains[found.name] = found
    if not domains:
        raise ConfigError(
            f"{folder} holds no domain: no folder of .txt, .jsonl, .jsonl.zst or .tar files, "
            "and no .jsonl or .jsonl.zst file"
        )
    return domains


def _domain_of(entry: Path) -> TextDomain | ShardDomain | None:
    if entry.is_file():
        for ending in (".jsonl.zst", ".jsonl"):
            if entry.name.endswith(ending):
                return TextDomain(entry.name.removesuffix(ending), (entry,))
        return None
    files = sorted(path for path in entry.iterdir() if path.is_file())
    shards = tuple(path for path in files if path.name.endswith(SHARD_ENDINGS))
    texts = tuple(path for path in files if path.name.endswith(_TEXT_ENDINGS))
    if shards and texts:
        raise ConfigError(
            f"{entry} holds both shards ({shards[0].name}) and text ({texts[0].name}); "
            "keep one kind in a folder"
        )
    if shards:
        return ShardDomain(entry.name, shards)
    return TextDomain(entry.name, texts) if texts else None


def text_domains(domains: Mapping[str, TextDomain | ShardDomain], folder: Path) -> list[TextDomain]:
    """Return the domains if all of them are text.

    Raises:
        ConfigError: one is shards already.
    """
    texts = []
    for domain in domains.values():
        if isinstance(domain, ShardDomain):
            raise ConfigError(
                f"{folder / domain.name} holds .tar shards already; only text can be packed"
            )
        texts.append(domain)
    return texts


def _read(path: Path, text_field: str) -> Iterator[Document]:
    try:
        if path.suffix == ".txt":
            yield _read_text_file(path)
        else:
            yield from _read_lines(path, text_field)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_text_file(path: Path) -> Document:
    num_bytes = path.stat().st_size
    if num_bytes > MAX_TEXT_FILE_BYTES:
        raise DataError(
            f"{path} has {num_bytes} bytes, more than {MAX_TEXT_FILE_BYTES} for one document; "
            "split it, or write it as .jsonl"
        )
    try:
        return Document(path.read_bytes().decode("utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def _read_lines(path: Path, text_field: str) -> Iterator[Document]:
    number = 0
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as lines:
            while line := lines.readline(MAX_LINE_CHARACTERS):
                number += 1
                if len(line) == MAX_LINE_CHARACTERS:
                    raise DataError(
                        f"{path}, line {number}: longer than {MAX_LINE_CHARACTERS} characters"
                    )
                if not line.isspace():
                    yield Document(
                        _text_of(line, path, number, text_field), f"{path.name}:{number}"
                    )
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {number}: not UTF-8 text") from error
    except zstandard.ZstdError as error:
        raise DataError(f"{path}, after line {number}: damaged zstandard data: {error}") from error


def _decompressed(path: Path, raw: io.BufferedReader) -> io.TextIOWrapper:
    if path.suffix != ".zst":
        return io.TextIOWrapper(raw, encoding="utf-8")
    reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return io.TextIOWrapper(io.BufferedReader(reader), encoding="utf-8")


def _text_of(line: str, path: Path, number: int, text_field: str) -> str:
    place = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON object is wanted, got {type(value).__name__}")
    text = value.get(text_field)
    if not isinstance(text, str):
        got = "no such field" if text_field not in value else type(text).__name__
        raise DataError(f"{place}: field {text_field!r} must hold the text, got {got}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: the text holds half of a surrogate pair") from error
    return text
