"""The corpus that needs no data: real text, bounded, the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.corpus import (
    MAX_DOCUMENT_CHARACTERS,
    build_corpus,
    docstrings,
    installation_folders,
    list_files,
    read_text,
)
from deploy.documents import Document, Sieve, in_parts


def test_this_installation_holds_at_least_six_domains() -> None:
    files = list_files(installation_folders())
    domains = build_corpus(files, max_domain_bytes=200_000, min_documents=8)
    assert len(domains) >= 6
    for documents in domains.values():
        num_bytes = sum(len(document.text.encode()) for document in documents)
        assert 0 < num_bytes <= 200_000
        assert all(len(document.text) <= MAX_DOCUMENT_CHARACTERS for document in documents)


def write(folder: Path, name: str, text: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(12):
        write(tmp_path, f"package/module{index}.py", f"value_{index} = {index}\n" * 30)
    return tmp_path


def test_the_same_files_make_the_same_corpus(folder: Path) -> None:
    def build() -> list[Document]:
        files = list_files({"here": folder})
        return build_corpus(files, max_domain_bytes=10_000, min_documents=2)["python"]

    first = build()
    assert first == build()
    assert [document.origin for document in first] != sorted(d.origin for d in first)


def test_duplicates_short_texts_and_bytes_that_are_no_text_are_left_out(folder: Path) -> None:
    write(folder, "package/copy.py", "value_0 = 0\n" * 30)
    write(folder, "package/short.py", "x = 1\n")
    write(folder, "package/latin.py", b"# caf\xe9\n" * 60)
    write(folder, "package/nul.py", b"a = 1\0\n" * 60)
    write(folder, "package/minified.py", "x = '" + "a" * 9000 + "'\n")
    write(folder, "package/__pycache__/cached.py", "cached = 1\n" * 60)
    write(folder, "package/site-packages/other.py", "other = 1\n" * 60)
    files = list_files({"here": folder})
    documents = build_corpus(files, max_domain_bytes=1 << 20, min_documents=2)["python"]
    assert len(documents) == 12
    assert all(document.text.startswith("value_") for document in documents)


def test_a_domain_with_too_few_documents_is_left_out(folder: Path) -> None:
    write(folder, "package/page.css", "body { color: red }\n" * 20)
    files = list_files({"here": folder})
    assert set(build_corpus(files, max_domain_bytes=1 << 20, min_documents=2)) == {"python"}


def test_a_link_that_leads_nowhere_is_no_file(folder: Path) -> None:
    (folder / "package" / "dangling.py").symlink_to(folder / "nowhere.py")
    assert len(list_files({"here": folder})) == 12
    assert read_text(folder / "nowhere.py") is None


def test_docstrings_come_from_modules_classes_and_functions_but_not_from_inside_them() -> None:
    long = "It says so much of what it does that it fills more than a line of eighty characters, "
    source = f'"""Module. {long}"""\nclass A:\n    """Class. {long}"""\n    def f(self):\n'
    source += f'        """Method. {long}"""\n        def g():\n            """Inner. {long}"""\n'
    text = docstrings(source)
    assert [part.split(".")[0] for part in text.split("\n\n")] == ["Module", "Class", "Method"]
    assert docstrings("def broken(:") == ""


def test_parts_add_up_to_the_document_and_end_at_lines() -> None:
    text = "".join(f"line {index}\n" for index in range(1000))
    parts = list(in_parts(Document(text, "origin"), max_characters=500))
    assert "".join(part.text for part in parts) == text
    assert all(len(part.text) <= 500 and part.text.endswith("\n") for part in parts)
    assert parts[1].origin == "origin#1"


def test_a_document_of_one_endless_line_is_cut_all_the_same() -> None:
    parts = list(in_parts(Document("x" * 1050, "origin"), max_characters=500))
    assert [len(part.text) for part in parts] == [500, 500, 50]


def test_a_sieve_counts_what_it_drops() -> None:
    sieve = Sieve(min_characters=3)
    kept = list(sieve.keep([Document(text, "") for text in ("abc", "ab", "abc", "abd")]))
    assert [document.text for document in kept] == ["abc", "abd"]
    assert (sieve.num_short, sieve.num_duplicates) == (1, 1)
