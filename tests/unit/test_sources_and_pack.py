"""Users' folders: what is a domain, what is an error, and what becomes of it in shards."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from typer.testing import CliRunner, Result

from deploy.commands import app
from deploy.documents import Document
from deploy.pack import MANIFEST, pack, partial_folder
from deploy.sources import ShardDomain, TextDomain, find_domains, text_domains
from deploy.tokenizer import END_OF_TEXT, copy_tokenizer, train_tokenizer
from protos.errors import ConfigError, DataError, TokenizerInvalid
from protos.tokenizer import describe_tokenizer


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(folder: Path, name: str) -> list[str]:
    domain = find_domains(folder)[name]
    assert isinstance(domain, TextDomain)
    return [document.text for document in domain.documents(text_field="text")]


def test_every_layout_is_a_domain(tmp_path: Path) -> None:
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "b.txt").write_text("second")
    (tmp_path / "prose" / "a.txt").write_text("first")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "part.jsonl").write_bytes(jsonl("one", "two"))
    (tmp_path / "web.jsonl").write_bytes(jsonl("three") + b"\n")
    compressed = zstandard.compress(jsonl("four")) + zstandard.compress(jsonl("five"))
    (tmp_path / "mail.jsonl.zst").write_bytes(compressed)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "x.tar").write_bytes(b"")
    (tmp_path / "README.md").write_text("not a domain")
    (tmp_path / ".hidden").mkdir()
    assert list(find_domains(tmp_path)) == ["code", "mail", "prose", "shards", "web"]
    assert texts_of(tmp_path, "prose") == ["first", "second"]
    assert texts_of(tmp_path, "code") == ["one", "two"]
    assert texts_of(tmp_path, "web") == ["three"]
    assert texts_of(tmp_path, "mail") == ["four", "five"]
    assert isinstance(find_domains(tmp_path)["shards"], ShardDomain)
    with pytest.raises(ConfigError, match="shards holds .tar shards already"):
        text_domains(find_domains(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{broken\n", "web.jsonl, line 3: not JSON"),
        (b"[1, 2]\n", "web.jsonl, line 3: a JSON object is wanted, got list"),
        (b'{"content": "x"}\n', "web.jsonl, line 3: field 'text' must hold the text, got no such"),
        (b'{"text": 3}\n', "web.jsonl, line 3: field 'text' must hold the text, got int"),
        (b'{"text": "\\ud800"}\n', "web.jsonl, line 3: the text holds half of a surrogate pair"),
        (b'{"text": "\xff"}\n', "not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    (tmp_path / "web.jsonl").write_bytes(jsonl("one", "two") + line)
    with pytest.raises(DataError, match=complaint):
        texts_of(tmp_path, "web")


def test_damaged_zstandard_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl.zst").write_bytes(b"this is not zstandard")
    with pytest.raises(DataError, match=r"web\.jsonl\.zst, after line 0: damaged zstandard data"):
        texts_of(tmp_path, "web")


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: byte 3 is 0xe9"):
        texts_of(tmp_path, "prose")


def both_kinds(folder: Path) -> None:
    (folder / "web").mkdir()
    (folder / "web" / "a.txt").write_text("text")
    (folder / "web" / "a.tar").write_bytes(b"")


def twice(folder: Path) -> None:
    (folder / "web").mkdir()
    (folder / "web" / "a.txt").write_text("text")
    (folder / "web.jsonl").write_bytes(jsonl("one"))


def nothing(folder: Path) -> None:
    (folder / "notes.md").write_text("no data")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (both_kinds, r"holds both shards \(a.tar\) and text \(a.txt\)"),
        (twice, "domain 'web' is in"),
        (nothing, "holds no domain"),
    ],
)
def test_a_folder_that_is_not_domains_is_refused(
    tmp_path: Path, make: Callable[[Path], None], complaint: str
) -> None:
    make(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        find_domains(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        find_domains(tmp_path / "nowhere")


DOMAINS = {
    "web": [Document(f"web document {index} " * 40, f"{index}") for index in range(50)],
    "code": [Document(f"code document {index} " * 20, f"{index}") for index in range(30)],
}


def members(folder: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.append((member.name, file.read().decode()))
    return found


def test_packed_shards_hold_every_document_in_order(tmp_path: Path) -> None:
    packed = pack(DOMAINS, tmp_path / "out", shard_mb=0.01)
    assert packed["web"].num_documents == 50
    assert packed["web"].num_shards == len(list((tmp_path / "out" / "web").glob("*.tar"))) > 2
    found = members(tmp_path / "out" / "web")
    assert [text for _, text in found] == [document.text for document in DOMAINS["web"]]
    assert found[0][0] == "000000000.txt"
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["domains"]["code"]["num_documents"] == 30


def test_the_same_documents_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        pack(DOMAINS, tmp_path / name, shard_mb=0.01)
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").rglob("*.tar")}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").rglob("*.tar")}
    assert first == second


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.long
def test_packing_on_ray_gives_the_same_bytes_and_a_failure_there_is_told(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    (source / "prose").mkdir(parents=True)
    for number in range(40):
        (source / "prose" / f"{number}.txt").write_text(f"document {number} " * 50)
    (source / "code.jsonl").write_bytes(jsonl(*(f"line {number}" for number in range(300))))

    def packed(name: str, *options: str) -> Result:
        out = str(tmp_path / name)
        return CliRunner().invoke(app, ["pack", str(source), out, "--shard-mb", "0.01", *options])

    assert packed("here", "--processes", "1").exit_code == 0
    on_ray = packed("on_ray", "--ray", "local")
    assert on_ray.exit_code == 0, on_ray.output
    shards = {name: sorted((tmp_path / name).rglob("*.tar")) for name in ("here", "on_ray")}
    assert len(shards["here"]) > 3
    read = [
        [(path.parent.name, path.name, path.read_bytes()) for path in shards[name]]
        for name in ("here", "on_ray")
    ]
    assert read[0] == read[1]
    (source / "code.jsonl").write_bytes(jsonl("one") + b'{"text": 3}\n')
    failed = packed("failed", "--ray", "local")
    assert failed.exit_code == 4
    assert "code.jsonl, line 2: field 'text' must hold the text" in failed.stderr
    assert not (tmp_path / "failed").exists()


def test_packing_never_overwrites(tmp_path: Path) -> None:
    pack(DOMAINS, tmp_path / "out")
    with pytest.raises(ConfigError, match="out is there already"):
        pack(DOMAINS, tmp_path / "out")
    partial_folder(tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="another packing writes it or broke off"):
        pack(DOMAINS, tmp_path / "other")


def test_a_failed_packing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="domain 'empty' has no document"):
        pack({**DOMAINS, "empty": []}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    pack(DOMAINS, tmp_path / "out", progress=lambda *args: told.append(args))
    assert [domain for domain, _, _ in told] == ["web", "code"]


def test_the_same_text_trains_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("first.json", "second.json"):
        train_tokenizer(DOMAINS, tmp_path / name, vocab_size=300)
    data = (tmp_path / "first.json").read_bytes()
    assert data == (tmp_path / "second.json").read_bytes()
    info = describe_tokenizer(data, eot_token=END_OF_TEXT, source="first.json")
    assert info.vocab_size <= 300


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerInvalid, match="more than 256 tokens, got 256"):
        train_tokenizer(DOMAINS, tmp_path / "t.json", vocab_size=256)


def test_a_given_tokenizer_is_copied_as_it_is_and_a_wrong_file_is_refused(tmp_path: Path) -> None:
    train_tokenizer(DOMAINS, tmp_path / "given.json", vocab_size=300)
    copy_tokenizer(tmp_path / "given.json", tmp_path / "run" / "tokenizer.json")
    copied = (tmp_path / "run" / "tokenizer.json").read_bytes()
    assert copied == (tmp_path / "given.json").read_bytes()
    (tmp_path / "wrong.json").write_text("[]")
    with pytest.raises(TokenizerInvalid, match=r"wrong\.json is not a tokenizer"):
        copy_tokenizer(tmp_path / "wrong.json", tmp_path / "run" / "other.json")
    with pytest.raises(TokenizerInvalid, match="cannot be read"):
        copy_tokenizer(tmp_path / "none.json", tmp_path / "run" / "other.json")
    assert not (tmp_path / "run" / "other.json").exists()
