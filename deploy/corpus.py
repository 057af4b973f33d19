"""A small real corpus from the text that any Python installation holds.

Sources, headers, documentation, licences, data files: kinds of text that differ enough for a
mixing policy to have something to choose between, on a machine with no network and no data.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.parser import Parser
from itertools import islice
from pathlib import Path

from deploy.documents import MIN_CHARACTERS, Document, Sieve, in_parts

MAX_FILE_BYTES = 4 << 20
"""A larger file is generated or hostile; either way it is not read."""

MAX_DOCUMENT_CHARACTERS = 16_000
_MAX_PARTS = 8
"""A few thousand tokens a part, and few parts: else a few large files make up a whole domain."""

_SKIPPED_FOLDERS = frozenset({"__pycache__", ".git", "node_modules", "site-packages"})
_SKIPPED_FOLDERS |= {"dist-packages"}
"""The standard library's folder may hold packages: of another environment, or listed already."""

_MAX_LINE_CHARACTERS = 5000
"""Longer lines are minified code or encoded bytes."""

_DATA_SUFFIXES = frozenset(
    (
        *(".afm", ".cfg", ".csv", ".dectest", ".graphml", ".ini", ".json", ".pem"),
        *(".tab", ".toml", ".xml", ".xsl", ".yaml", ".yml", ".zi"),
    )
)


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file below one of the installation's folders."""

    path: Path
    name: str
    """The folder's label and the path below it: the same on any machine with the same packages."""

    num_bytes: int


def installation_folders() -> dict[str, Path]:
    """Return the folders of this Python that hold text, by label."""
    found = {
        "stdlib": Path(sysconfig.get_path("stdlib")),
        "packages": Path(sysconfig.get_path("purelib")),
        "platform_packages": Path(sysconfig.get_path("platlib")),
        "include": Path(sysconfig.get_path("include")),
    }
    distinct: dict[str, Path] = {}
    for label, path in found.items():
        if path.is_dir() and path.resolve() not in {held.resolve() for held in distinct.values()}:
            distinct[label] = path
    return distinct


def list_files(folders: Mapping[str, Path]) -> list[TextFile]:
    """Return every file of a bearable size, in an order that mixes the packages.

    The order goes by a hash of the name: it is the same everywhere, and the first megabytes of a
    kind come from many packages rather than from the first in the alphabet.
    """
    files = []
    for label, folder in folders.items():
        for path in _walk(folder):
            try:
                num_bytes = path.stat().st_size
            except OSError:
                continue
            if MIN_CHARACTERS <= num_bytes <= MAX_FILE_BYTES:
                name = f"{label}/{path.relative_to(folder).as_posix()}"
                files.append(TextFile(path, name, num_bytes))
    return sorted(files, key=lambda file: hashlib.blake2b(file.name.encode()).digest())


def _walk(folder: Path) -> Iterator[Path]:
    for parent, names, files in os.walk(folder):
        names[:] = [name for name in names if name not in _SKIPPED_FOLDERS]
        yield from (Path(parent, name) for name in files)


def read_text(path: Path) -> str | None:
    """Return a file's text; None if it is not UTF-8 text that a person could have written."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if "\0" in text or "\ufffd" in text:
        return None
    if max(map(len, text.split("\n"))) > _MAX_LINE_CHARACTERS:
        return None
    return text.replace("\r\n", "\n")


def _whole(file: TextFile) -> Iterator[Document]:
    text = read_text(file.path)
    if text is not None:
        yield Document(text, file.name)


def _documentation(file: TextFile) -> Iterator[Document]:
    """Yield a page of documentation, a package's description, or a module's docstrings."""
    text = read_text(file.path)
    if text is None:
        return
    if file.path.name == "METADATA":
        description = Parser().parsestr(text).get_payload()
        yield Document(str(description), file.name)
    elif file.path.suffix == ".py":
        yield Document(docstrings(text), file.name)
    else:
        yield Document(text, file.name)


def docstrings(source: str) -> str:
    """Return the docstrings of a module that are at least a paragraph long, in their order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are not our business
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    found = [ast.get_docstring(node) for node in _documented(tree)]
    return "\n\n".join(text for text in found if text and len(text) >= 80)


def _documented(
    node: ast.Module | ast.ClassDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield a module or class and what it defines; what functions hold inside is private."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documented(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child


def _in_dist_info(file: TextFile) -> bool:
    return ".dist-info/" in file.name


def _is_licence(file: TextFile) -> bool:
    stem = file.path.name.upper()
    names = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS", "THIRD_PARTY", "THIRDPARTY")
    return stem.startswith(names) and file.path.suffix.lower() in ("", ".txt", ".md", ".rst")


def _is_documentation(file: TextFile) -> bool:
    if _is_licence(file) or (_in_dist_info(file) and file.path.name != "METADATA"):
        return False
    if file.path.name == "METADATA":
        return True
    # Below a folder of tests, text files are data and docstrings say nothing.
    return file.path.suffix.lower() in (".rst", ".md", ".txt", ".py") and "/test" not in file.name


def _has_suffix(*suffixes: str) -> Callable[[TextFile], bool]:
    return lambda file: file.path.suffix.lower() in suffixes and not _in_dist_info(file)


def _is_data(file: TextFile) -> bool:
    return file.path.suffix.lower() in _DATA_SUFFIXES and not _in_dist_info(file)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a domain's text is found."""

    name: str
    takes: Callable[[TextFile], bool]
    read: Callable[[TextFile], Iterator[Document]]


_KINDS = (
    _Kind("python", _has_suffix(".py"), _whole),
    _Kind("cpp_headers", _has_suffix(".h", ".hh", ".hpp", ".cuh"), _whole),
    _Kind("docs", _is_documentation, _documentation),
    _Kind("licences", _is_licence, _whole),
    _Kind("data", _is_data, _whole),
    _Kind("type_stubs", _has_suffix(".pyi"), _whole),
    _Kind("web", _has_suffix(".js", ".css", ".html", ".mjs", ".ts"), _whole),
)


def build_corpus(
    files: list[TextFile], *, max_domain_bytes: int, min_documents: int
) -> dict[str, list[Document]]:
    """Return each domain's documents; a domain with fewer than `min_documents` is left out."""
    domains = {}
    for kind in _KINDS:
        documents = list(_bounded(kind, files, max_domain_bytes))
        if len(documents) >= min_documents:
            domains[kind.name] = documents
    return domains


def _bounded(kind: _Kind, files: list[TextFile], max_domain_bytes: int) -> Iterator[Document]:
    num_bytes = 0
    sieve = Sieve()
    for file in files:
        if not kind.takes(file):
            continue
        for document in sieve.keep(kind.read(file)):
            parts = in_parts(document, max_characters=MAX_DOCUMENT_CHARACTERS)
            for part in islice(parts, _MAX_PARTS):
                num_bytes += len(part.text.encode())
                if num_bytes > max_domain_bytes:
                    return
                yield part
