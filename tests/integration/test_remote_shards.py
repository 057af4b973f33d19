"""Remote shards, from a real web server and a real S3-compatible store that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from loader_workers.convert import Converter
from loader_workers.index import build_index, expand
from loader_workers.location import parse_location
from loader_workers.remote import Remote, RemoteSettings
from loader_workers.shard_file import open_object, open_shard
from protos.dataset_index import ShardRef
from protos.errors import ConfigError, DomainEmpty, NotReady, ShardUnreadable
from protos.retry import Retry
from tests.fakes_loader import random_documents, shard_bytes, tokenize_words
from tests.fakes_store import ACCESS_KEY, REGION, SECRET_KEY, FaultyStore, serving_store

DOCUMENTS = random_documents(3, 200)
DATA = shard_bytes([{"__key__": f"{n:04d}", "txt": text} for n, text in enumerate(DOCUMENTS)])


@pytest.fixture
def store() -> FaultyStore:
    store = FaultyStore()
    store.objects = {f"web/{n:04d}.tar": DATA for n in range(3)}
    return store


@pytest.fixture
def http(store: FaultyStore) -> Iterator[str]:
    with serving_store(store) as base:
        yield base


@pytest.fixture
def s3(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving_store(store, s3_bucket="bucket") as base:
        monkeypatch.setenv("AWS_ENDPOINT_URL", base)
        monkeypatch.setenv("AWS_REGION", REGION)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        yield "s3://bucket"


@pytest.fixture
def gs(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving_store(store, gcs_bucket="bucket") as base:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", base.removeprefix("http://"))
        yield "gs://bucket"


def _remote(*, budget_s: float = 5.0, timeout_s: float = 5.0, chunk: int = 16 << 10) -> Remote:
    return Remote(
        RemoteSettings(
            chunk_bytes=chunk,
            budget_s=budget_s,
            request_timeout_s=timeout_s,
            retry=Retry(first_wait_s=0.01, max_wait_s=0.05),
        )
    )


def _ref(url: str, tmp_path: Path) -> ShardRef:
    (tmp_path / "local.tar").write_bytes(DATA)
    index = build_index({"web": [str(tmp_path / "local.tar")]}, text_field="text", max_bad_share=0)
    (local,) = index.shards("web")
    return ShardRef(
        domain="web",
        url=url,
        num_bytes=local.num_bytes,
        num_samples=local.num_samples,
        text_bytes=local.text_bytes,
        sha256=local.sha256,
    )


def _converter(remote: Remote) -> Converter:
    return Converter(
        tokenize=tokenize_words(),
        text_field="text",
        vocab_size=300,
        eot_id=201,
        dtype=np.dtype("<u2"),
        remote=remote,
    )


def _whole(url: str, remote: Remote) -> bytes:
    with open_object(url, remote=remote) as opened:
        return b"".join(
            opened.read_at(start, 16 << 10) for start in range(0, opened.num_bytes, 16 << 10)
        )


def test_shards_of_a_web_server_are_indexed_and_read(http: str, tmp_path: Path) -> None:
    index = build_index(
        {"web": [f"{http}/web/{{0000..0002}}.tar"]}, text_field="text", max_bad_share=0
    )
    assert [shard.url for shard in index.shards("web")] == [
        f"{http}/web/{n:04d}.tar" for n in range(3)
    ]
    converted = _converter(_remote()).convert(index.shards("web")[1])
    expected = tokenize_words()(DOCUMENTS)
    assert not converted.lost
    np.testing.assert_array_equal(converted.tokens, np.concatenate(expected))


@pytest.mark.parametrize("where", ["s3", "gs"])
def test_shards_of_a_bucket_are_listed_page_by_page_and_read(
    where: str, store: FaultyStore, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue(where)
    store.objects |= {"web/deep/0009.tar": DATA, "web/note.txt": b"", "other/0001.tar": DATA}
    found = expand("web", [f"{bucket}/web/*.tar"], remote=_remote())
    assert found == [f"{bucket}/web/{n:04d}.tar" for n in range(3)]
    deep = expand("web", [f"{bucket}/web/**/*.tar"], remote=_remote())
    assert f"{bucket}/web/deep/0009.tar" in deep
    assert _whole(found[0], _remote()) == DATA
    with pytest.raises(DomainEmpty, match=rf"no file matches '{bucket}/none/\*.tar'"):
        expand("web", [f"{bucket}/none/*.tar"], remote=_remote())


def test_credentials_come_from_the_users_own_file_if_the_environment_has_none(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    lines = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    (tmp_path / "credentials").write_text(f"[default]\n{lines}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert _whole(f"{s3}/web/0000.tar", _remote()) == DATA


@pytest.mark.fault_row(27, "credentials that the store refuses")
def test_refused_credentials_are_no_fault_of_the_shard(
    s3: str,
    store: FaultyStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_injections: Callable[..., None],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-canary")
    with pytest.raises(NotReady) as caught:
        _converter(_remote()).convert(_ref(f"{s3}/web/0000.tar", tmp_path))
    assert "canary" not in str(caught.value)
    assert "cannot read s3://bucket/web/0000.tar now, after 3 tries" in str(caught.value)
    record_injections(store.num_requests)


@pytest.mark.fault_row(27, "credentials that expire for good, and are not renewed")
def test_expired_credentials_are_no_fault_of_the_shard(
    s3: str, store: FaultyStore, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    store.plan(*["expired"] * 1000)
    with pytest.raises(NotReady, match=r"cannot read s3.*0000.tar now, after \d+ tries: .*400"):
        _converter(_remote(budget_s=0.3)).convert(_ref(f"{s3}/web/0000.tar", tmp_path))
    record_injections(store.happened["expired"])


@pytest.mark.fault_row(27, "answers that are errors, short, of another range, or broken off")
@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "403", "expired", "short", "range", "reset"]
)
@pytest.mark.parametrize("where", ["http", "s3", "gs"])
def test_what_may_pass_is_tried_again(
    fault: str,
    where: str,
    store: FaultyStore,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_injections: Callable[..., None],
) -> None:
    base = request.getfixturevalue(where)
    remote = _remote()
    ref = _ref(f"{base}/web/0000.tar", tmp_path)
    # Who is refused has credentials that were renewed a moment later, or none that are.
    times = 2 if fault == "403" else 4
    store.plan(*[fault] * times)
    converted = _converter(remote).convert(ref)
    assert store.all_happened()
    assert store.happened[fault] == times
    assert remote.num_retries == times
    record_injections(times)
    assert not converted.lost
    assert not converted.damaged
    np.testing.assert_array_equal(converted.tokens, np.concatenate(tokenize_words()(DOCUMENTS)))


@pytest.mark.fault_row(27, "a first byte that does not come")
def test_a_slow_first_byte_is_given_up_and_asked_for_again(
    http: str, store: FaultyStore, record_injections: Callable[..., None]
) -> None:
    remote = _remote(timeout_s=0.3)
    store.plan("slow")
    assert _whole(f"{http}/web/0000.tar", remote) == DATA
    assert store.happened["slow"] == 1
    assert remote.num_retries == 1
    record_injections(1)


@pytest.mark.fault_row(27, "a storm of 503 that outlasts the budget of tries")
def test_a_storm_beyond_the_budget_is_no_fault_of_the_shard(
    http: str, store: FaultyStore, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    store.plan(*["503"] * 1000)
    with pytest.raises(NotReady, match=r"cannot read http.*0000.tar now, after \d+ tries: .*503"):
        _converter(_remote(budget_s=0.3)).convert(_ref(f"{http}/web/0000.tar", tmp_path))
    assert 3 < store.happened["503"] < 100
    record_injections(store.happened["503"])


def test_a_shard_that_is_gone_is_lost_at_once(
    http: str, store: FaultyStore, tmp_path: Path
) -> None:
    lost = _converter(_remote()).convert(_ref(f"{http}/web/gone.tar", tmp_path)).lost
    assert "gone.tar" in lost
    assert "404" in lost
    assert store.num_requests == 1


@pytest.mark.fault_row(26, "an object replaced, or shortened, between two ranges of it")
@pytest.mark.parametrize("other", [DATA[::-1], DATA[:-512]], ids=["other etag", "other size"])
def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(
    other: bytes, http: str, store: FaultyStore, record_injections: Callable[..., None]
) -> None:
    replaced: list[str] = []

    def replace() -> None:
        store.objects["web/0000.tar"] = other
        replaced.append("web/0000.tar")

    store.after = replace
    with pytest.raises(ShardUnreadable, match="changed while it was read: it had"):
        _whole(f"{http}/web/0000.tar", _remote())
    record_injections(len(replaced))


def test_other_bytes_than_the_index_says_are_lost(
    http: str, store: FaultyStore, tmp_path: Path
) -> None:
    ref = _ref(f"{http}/web/0000.tar", tmp_path)
    store.objects["web/0000.tar"] = DATA + bytes(512)
    assert "bytes, the dataset index says" in _converter(_remote()).convert(ref).lost


def test_a_redirect_to_another_scheme_is_not_followed(http: str, tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="302"):
        _whole(f"{http}/elsewhere/x.tar", _remote(budget_s=0.1))


def test_a_web_server_cannot_be_listed(http: str) -> None:
    with pytest.raises(ConfigError, match="a web server cannot be listed; name the shards"):
        expand("web", [f"{http}/web/*.tar"])


def test_reading_goes_in_large_ranges_and_ahead(http: str, store: FaultyStore) -> None:
    with open_shard(f"{http}/web/0000.tar", remote=_remote(chunk=64 << 10)) as shard:
        assert sum(1 for _ in shard.members) == len(DOCUMENTS)
        shard.sha256()
    assert store.num_requests == 1 + -(-len(DATA) // (64 << 10))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://user:canary@host/x.tar", "has a user or password inside"),
        ("s3://user:canary@bucket/x.tar", "has a user or password inside"),
        ("https://host/x.tar?sig=canary", "has a query or fragment"),
        ("pipe:cat /etc/passwd", "has the scheme 'pipe'"),
        ("http://[::1/x.tar", "is no URL"),
        ("s3://bucket", "must be written s3://host-or-bucket/path"),
        ("file://elsewhere/x.tar", "names the host 'elsewhere'"),
    ],
)
def test_a_url_that_is_not_read_is_refused_without_its_secrets(url: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse_location(url)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["$HOME/x.tar", "~/x.tar", "$(touch x).tar", "`id`.tar"])
def test_nothing_in_a_pattern_is_expanded_by_a_shell(pattern: str) -> None:
    with pytest.raises(DomainEmpty, match="no file matches"):
        expand("web", [pattern])
