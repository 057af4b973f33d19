"""The dataset index: what building it refuses, quarantines and counts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loader_workers.index import build_index, write_index
from loader_workers.worker import check_tokenized
from protos.dataset_index import DatasetIndex, ShardRef
from protos.errors import ConfigError, DomainEmpty, IndexMismatch, TooMuchLost, UnknownDomain
from tests.fakes_loader import npy_bytes, shard_bytes, write_text_shards


def _build(domains: dict[str, list[str]], *, max_bad_share: float = 0.0) -> DatasetIndex:
    return build_index(domains, text_field="text", max_bad_share=max_bad_share)


def _two_domains(folder: Path) -> dict[str, list[str]]:
    return {
        "web": [write_text_shards(folder, "web", ["one two", "drei", "é"], num_shards=2)],
        "code": [write_text_shards(folder, "code", ["x" * 50] * 4, num_shards=1)],
    }


def _shard(**changes: object) -> ShardRef:
    values: dict[str, object] = {
        "domain": "web",
        "url": "/data/0.tar",
        "num_bytes": 10240,
        "num_samples": 3,
        "text_bytes": 99,
        "sha256": "0" * 64,
    }
    return ShardRef(**{**values, **changes})  # type: ignore[arg-type]  # a bag of defaults


def test_it_counts_samples_text_and_bytes_and_hashes_every_shard(tmp_path: Path) -> None:
    index = _build(_two_domains(tmp_path))
    assert index.domains == ("web", "code")
    assert (index.num_samples("web"), index.num_samples("code")) == (3, 4)
    assert (index.text_bytes("web"), index.text_bytes("code")) == (7 + 4 + 2, 200)
    for shard in index.shards("web"):
        data = Path(shard.url).read_bytes()
        assert shard.num_bytes == len(data)
        assert shard.sha256 == hashlib.sha256(data).hexdigest()
        assert shard.format == "text"


def test_the_same_shards_give_the_same_bytes_and_they_read_back(tmp_path: Path) -> None:
    domains = _two_domains(tmp_path)
    index, again = _build(domains), _build(domains)
    assert index.to_parquet() == again.to_parquet()
    read = DatasetIndex.from_parquet(index.to_parquet())
    assert read.sha256 == index.sha256 == hashlib.sha256(index.to_parquet()).hexdigest()
    assert [read.shards(name) for name in read.domains] == [
        index.shards(name) for name in index.domains
    ]


def test_what_was_read_keeps_its_hash_though_another_version_would_write_other_bytes() -> None:
    table = pq.read_table(pa.BufferReader(DatasetIndex([_shard()]).to_parquet()))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none")
    data = sink.getvalue().to_pybytes()
    assert DatasetIndex.from_parquet(data).sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is not a Parquet file"),
        (b"domain,url\n", "is not a Parquet file"),
        (DatasetIndex([_shard()]).to_parquet()[:-9], "is not a Parquet file"),
    ],
)
def test_a_file_that_is_not_an_index_is_refused_in_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(IndexMismatch, match=f"index.parquet {sentence}; build it again with"):
        DatasetIndex.from_parquet(data, source="index.parquet")


@pytest.mark.parametrize(
    ("columns", "metadata", "sentence"),
    [
        ({"a": [1]}, {}, "has index version none, this program reads version 1"),
        ({"a": [1]}, {"headrace.index.version": "9"}, "has index version 9"),
        ({"a": [1]}, {"headrace.index.version": "1"}, "has other columns than an index"),
    ],
)
def test_another_parquet_file_is_refused_in_one_sentence(
    columns: dict[str, list[int]], metadata: dict[str, str], sentence: str
) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), sink)
    with pytest.raises(IndexMismatch, match=sentence):
        DatasetIndex.from_parquet(sink.getvalue().to_pybytes())


def test_an_index_row_that_cannot_be_is_refused() -> None:
    table = pq.read_table(pa.BufferReader(DatasetIndex([_shard()]).to_parquet()))
    column = table.schema.get_field_index("num_samples")
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.set_column(column, table.schema.field(column), pa.array([[-1]])[0].values), sink
    )
    with pytest.raises(IndexMismatch, match="a row that cannot be: num_samples must not be"):
        DatasetIndex.from_parquet(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    "changes",
    [
        {"domain": ""},
        {"num_samples": -1},
        {"format": "zip"},
        {"sha256": "short"},
        {"quarantined": "damaged"},
    ],
)
def test_a_shard_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must|counts"):
        _shard(**changes)


def test_an_unknown_domain_is_named_with_those_there_are() -> None:
    with pytest.raises(UnknownDomain, match="no domain 'books'; it has web"):
        DatasetIndex([_shard()]).shards("books")


@pytest.mark.parametrize("patterns", [["{folder}/none/*.tar"], ["{folder}/gone.tar"]])
def test_a_domain_without_shards_is_named_with_its_patterns(
    tmp_path: Path, patterns: list[str]
) -> None:
    patterns = [pattern.format(folder=tmp_path) for pattern in patterns]
    with pytest.raises(
        DomainEmpty, match=rf"domain 'web': no file matches '{patterns[0]}'".replace("*", r"\*")
    ):
        _build({"web": patterns})


def test_a_domain_without_patterns_is_named() -> None:
    with pytest.raises(DomainEmpty, match="'web' names no shards; set data.domains.web.shards"):
        _build({"web": []})


def test_a_domain_without_samples_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(shard_bytes([]))
    with pytest.raises(DomainEmpty, match="'web' has no samples in its 1 shards"):
        _build({"web": [str(tmp_path / "empty.tar")]})


def test_a_shard_in_two_domains_is_refused(tmp_path: Path) -> None:
    domains = _two_domains(tmp_path)
    with pytest.raises(ConfigError, match="is in the domains 'web' and 'code'; give it to one"):
        _build({**domains, "code": domains["web"]})


@pytest.mark.parametrize("url", ["pipe:cat x", "ftp://host/x.tar", "data:x", "gopher://h/x.tar"])
def test_only_known_schemes_are_read(url: str) -> None:
    with pytest.raises(
        ConfigError, match="read are local paths and file:, http:, https:, s3:, gs:"
    ):
        _build({"web": [url]})


def test_a_file_url_names_a_local_file(tmp_path: Path) -> None:
    write_text_shards(tmp_path, "web", ["a b"], num_shards=1)
    index = _build({"web": [f"file://{tmp_path}/web/0000.tar"]})
    assert index.shards("web")[0].url == str(tmp_path / "web" / "0000.tar")


def test_an_unreadable_shard_beyond_the_allowed_share_stops_the_build(tmp_path: Path) -> None:
    domains = _two_domains(tmp_path)
    damaged = tmp_path / "web" / "0001.tar"
    damaged.write_bytes(damaged.read_bytes()[:700])
    with pytest.raises(TooMuchLost) as caught:
        _build(domains)
    said = str(caught.value)
    assert f"domain 'web' has an unreadable shard: {damaged}: the file ends within" in said
    assert "data.max_bad_share allows 0: mend or remove it, or raise data.max_bad_share" in said


def test_an_unreadable_shard_within_the_allowed_share_stays_as_a_row(tmp_path: Path) -> None:
    domains = _two_domains(tmp_path)
    damaged = tmp_path / "web" / "0001.tar"
    damaged.write_bytes(damaged.read_bytes()[:700])
    index = _build(domains, max_bad_share=0.5)
    kept, lost = index.shards("web")
    assert not kept.quarantined
    assert "the file ends within" in lost.quarantined
    assert (lost.num_samples, lost.num_bytes, index.num_samples("web")) == (0, 700, 2)
    assert DatasetIndex.from_parquet(index.to_parquet()).shards("web")[1] == lost


def test_unreadable_samples_keep_their_numbers_and_count_against_the_allowed_share(
    tmp_path: Path,
) -> None:
    samples = [{"__key__": str(n), "txt": b"\xff" if n == 3 else b"fine"} for n in range(10)]
    (tmp_path / "a.tar").write_bytes(shard_bytes(samples))
    domains = {"web": [str(tmp_path / "a.tar")]}
    index = _build(domains, max_bad_share=0.1)
    assert index.num_samples("web") == 10
    assert index.text_bytes("web") == 9 * 4
    with pytest.raises(TooMuchLost, match=r"1 of 10 samples are unreadable .* '3': its text is no"):
        _build(domains, max_bad_share=0.05)


def test_token_shards_are_told_from_text_and_need_no_tokenizer(tmp_path: Path) -> None:
    ids = npy_bytes(np.arange(5))
    (tmp_path / "tokens.tar").write_bytes(shard_bytes([{"__key__": "a", "npy": ids}]))
    (tmp_path / "mixed.tar").write_bytes(
        shard_bytes([{"__key__": "a", "npy": ids}, {"__key__": "b", "txt": "text"}])
    )
    tokens = _build({"web": [str(tmp_path / "tokens.tar")]})
    mixed = _build({"web": [str(tmp_path / "mixed.tar")]})
    assert (tokens.shards("web")[0].format, tokens.text_bytes("web")) == ("tokens", 20)
    assert mixed.shards("web")[0].format == "mixed"
    check_tokenized(tokens, has_tokenizer=False)
    with pytest.raises(IndexMismatch, match=r"mixed.tar of domain 'web' holds text, and the run"):
        check_tokenized(mixed, has_tokenizer=False)


def test_progress_is_told_shard_by_shard(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build_index(
        _two_domains(tmp_path),
        text_field="text",
        max_bad_share=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_an_index_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "index.parquet"
    index = DatasetIndex([_shard()])
    write_index(index, path)
    write_index(replace_shard(index, num_samples=4), path)
    assert DatasetIndex.from_parquet(path.read_bytes()).num_samples("web") == 4
    assert [each.name for each in path.parent.iterdir()] == ["index.parquet"]
    with pytest.raises(IsADirectoryError):
        write_index(index, tmp_path / "runs")
    assert [each.name for each in tmp_path.iterdir()] == ["runs"]


def replace_shard(index: DatasetIndex, *, num_samples: int) -> DatasetIndex:
    return DatasetIndex([replace(index.shards("web")[0], num_samples=num_samples)])
