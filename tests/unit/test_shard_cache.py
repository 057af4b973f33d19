"""The shard cache builds once, trusts nothing that is damaged, and stays within its budget."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loader_workers import cache as cache_module
from loader_workers import shard_file
from loader_workers.build_pool import BuildPool
from loader_workers.cache import ShardCache, private_directory
from loader_workers.convert import Converter, Documents
from loader_workers.index import build_index
from protos.dataset_index import DatasetIndex, ShardRef
from protos.errors import ConfigError, NotReady
from tests.fakes_loader import (
    npy_bytes,
    random_documents,
    shard_bytes,
    tokenize_words,
    write_text_shards,
)


class _CountingTokenize:
    """Counts how often it is called."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._tokenize = tokenize_words()

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        self.num_calls += 1
        return self._tokenize(texts)


def _index(folder: Path, *, num_shards: int = 3) -> DatasetIndex:
    pattern = write_text_shards(folder, "web", random_documents(1, 60), num_shards=num_shards)
    return build_index({"web": [pattern]}, text_field="text", max_bad_share=0)


def _converter(tokenize: _CountingTokenize | None, **changes: int) -> Converter:
    vocab_size = changes.get("vocab_size", 300)
    return Converter(
        tokenize=tokenize,
        text_field="text",
        vocab_size=vocab_size,
        eot_id=201,
        dtype=np.dtype("<u2"),
    )


def _cache(
    folder: Path, tokenize: _CountingTokenize | None, *, budget_bytes: int = 1 << 30
) -> ShardCache:
    return ShardCache(
        folder,
        budget_bytes=budget_bytes,
        converter=_converter(tokenize),
        tokenizer_sha256="words",
        threads=2,
    )


def _token_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tokens"))


def test_a_shard_is_tokenized_once_for_all_caches_on_a_folder(tmp_path: Path) -> None:
    (shard, *_), counting = _index(tmp_path).shards("web"), _CountingTokenize()
    with _cache(tmp_path / "c", counting) as first, _cache(tmp_path / "c", counting) as second:
        got: list[NDArray[np.generic]] = []
        threads = [
            threading.Thread(target=lambda cache=cache: got.append(cache.get(shard).tokens))
            for cache in (first, second) * 4
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counting.num_calls == 1
        assert len(got) == 8
        for tokens in got:
            np.testing.assert_array_equal(tokens, got[0])
    with _cache(tmp_path / "c", counting) as later:
        np.testing.assert_array_equal(later.get(shard).tokens, got[0])
    assert counting.num_calls == 1


def test_documents_are_the_samples_in_order(tmp_path: Path) -> None:
    documents = random_documents(1, 60)
    with _cache(tmp_path / "c", _CountingTokenize()) as cache:
        for number, shard in enumerate(_index(tmp_path).shards("web")):
            found = cache.get(shard)
            expected = tokenize_words()(documents[number::3])
            cut = np.split(found.tokens, found.offsets[1:-1])
            assert [part.tolist() for part in cut] == [part.tolist() for part in expected]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_token_shard_is_built_again(tmp_path: Path, damage: str) -> None:
    (shard, *_), counting = _index(tmp_path).shards("web"), _CountingTokenize()
    with _cache(tmp_path / "c", counting) as cache:
        expected = cache.get(shard).tokens.copy()
    (file,) = _token_files(tmp_path / "c")
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes({"flip": flipped, "cut": whole[:-4], "empty": b""}[damage])
    with _cache(tmp_path / "c", counting) as cache:
        np.testing.assert_array_equal(cache.get(shard).tokens, expected)
    assert counting.num_calls == 2
    assert file.read_bytes() == whole


def test_another_tokenizer_or_text_field_gives_another_token_shard(tmp_path: Path) -> None:
    (shard, *_), counting = _index(tmp_path).shards("web"), _CountingTokenize()
    for tokenizer, field in (("a", "text"), ("b", "text"), ("a", "body")):
        converter = replace(_converter(counting), text_field=field)
        with ShardCache(
            tmp_path / "c", budget_bytes=1 << 30, converter=converter, tokenizer_sha256=tokenizer
        ) as cache:
            cache.get(shard)
    assert len(_token_files(tmp_path / "c")) == 3


def test_least_recently_used_shards_are_evicted_but_none_in_use(tmp_path: Path) -> None:
    index = _index(tmp_path, num_shards=6)
    shards, counting = index.shards("web"), _CountingTokenize()
    with _cache(tmp_path / "c", counting) as cache:
        cache.get(shards[0])
        one = cache.num_bytes()
    budget = 3 * one + one // 2
    with _cache(tmp_path / "c", counting, budget_bytes=budget) as cache:
        held = cache.get(shards[0])
        for shard in shards[1:]:
            cache.get(shard)
            cache.get(shards[1])
        assert cache.num_bytes() <= budget
        built = counting.num_calls
        cache.get(shards[1])
        assert counting.num_calls == built, "the one used most recently was evicted"
        np.testing.assert_array_equal(cache.get(shards[0]).tokens, held.tokens)
        assert counting.num_calls == built, "one in use was evicted"
        cache.get(shards[2])
        assert counting.num_calls == built + 1, "the oldest was not evicted"


def test_what_another_process_has_mapped_is_not_evicted(tmp_path: Path) -> None:
    shards, counting = _index(tmp_path).shards("web"), _CountingTokenize()
    with _cache(tmp_path / "c", counting) as cache:
        cache.get(shards[0])
    (file,) = _token_files(tmp_path / "c")
    holder = (
        "import sys; from pathlib import Path; "
        "from loader_workers.token_shard import open_token_shard; "
        "held = open_token_shard(Path(sys.argv[1]), verify=True); "
        "print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with _cache(tmp_path / "c", counting, budget_bytes=0) as cache:
            cache.get(shards[1])
            assert file.exists()
            process.communicate()
            cache.get(shards[2])
            assert not file.exists()


def test_leftovers_of_a_killed_writer_are_removed_and_a_living_ones_are_not(
    tmp_path: Path,
) -> None:
    folder = private_directory(tmp_path / "c")
    (folder / "writing-dead").write_bytes(b"half")
    with (folder / "writing-alive").open("wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        with _cache(folder, None):
            assert [each.name for each in folder.glob("writing-*")] == ["writing-alive"]


def test_a_disk_without_room_does_not_stop_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard, *_), counting = _index(tmp_path).shards("web"), _CountingTokenize()

    def no_room(path: Path, documents: Documents) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_token_shard", no_room)
    with _cache(tmp_path / "c", counting) as cache:
        assert len(cache.get(shard).tokens)
        cache.get(shard)
        assert counting.num_calls == 1
        assert not cache.quarantines()


def test_a_process_without_free_files_does_not_take_the_shard_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard, *_) = _index(tmp_path).shards("web")
    with _cache(tmp_path / "c", _CountingTokenize()) as cache:
        with monkeypatch.context() as patched:

            def no_files(url: str) -> Path:
                raise OSError(24, "Too many open files")

            patched.setattr(shard_file, "local_path", no_files)
            with pytest.raises(NotReady, match="Too many open files"):
                cache.get(shard)
        assert len(cache.get(shard).tokens)
        assert not cache.quarantines()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", "bytes, the dataset index says"),
        ("flip", "SHA-256 differs"),
        ("gone", "No such file"),
        ("header", "not a tar header"),
    ],
)
def test_a_shard_that_is_not_what_the_index_says_is_lost_whole(
    tmp_path: Path, damage: str, reason: str
) -> None:
    (shard, *_), counting = _index(tmp_path).shards("web"), _CountingTokenize()
    path = Path(shard.url)
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[data.rindex(b" w") if damage == "flip" else 7] ^= 1
        path.write_bytes(data[:-512] if damage == "cut" else data)
    with _cache(tmp_path / "c", counting) as cache:
        found = cache.get(shard)
        assert len(found.offsets) == shard.num_samples + 1
        assert not found.offsets.any()
        (quarantine,) = cache.quarantines()
    assert (quarantine.domain, quarantine.shard, quarantine.sample) == ("web", shard.url, -1)
    assert reason in quarantine.reason
    assert not _token_files(tmp_path / "c"), "a lost shard was cached"


def test_an_unreadable_sample_is_an_empty_document_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        shard_bytes(
            [
                {"__key__": "a", "txt": "w0 w1"},
                {"__key__": "b", "txt": b"\xff"},
                {"__key__": "c", "npy": npy_bytes(np.array([1, 300]))},
                {"__key__": "d", "txt": "w2"},
            ]
        )
    )
    index = build_index({"web": [str(tmp_path / "a.tar")]}, text_field="text", max_bad_share=0.5)
    for _ in range(2):
        # The second time it comes from the disk.
        with _cache(tmp_path / "c", _CountingTokenize()) as cache:
            found = cache.get(index.shards("web")[0])
            assert np.diff(found.offsets).tolist() == [2, 0, 0, 1]
            assert [(one.sample, one.reason) for one in cache.quarantines()] == [
                (1, "sample 'b': its text is not UTF-8 at byte 0"),
                (2, "sample 'c': token id 300 is not below vocab_size 300"),
            ]


def test_text_in_a_run_without_a_tokenizer_is_unreadable(tmp_path: Path) -> None:
    with _cache(tmp_path / "c", None) as cache:
        cache.get(_index(tmp_path).shards("web")[0])
        assert "the run has no tokenizer" in cache.quarantines()[0].reason


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="writable by you alone"):
        _cache(shared, None)
    assert (private_directory(tmp_path / "new").stat().st_mode & 0o777) == 0o700


def test_prefetch_builds_ahead_and_what_is_waited_for_goes_first() -> None:
    gate, order = threading.Event(), []
    started = threading.Event()

    def build(name: str) -> str:
        if name == "blocker":
            started.set()
            assert gate.wait(10)
        order.append(name)
        return name

    with BuildPool[str](threads=1) as pool:
        futures: list[Future[str]] = [pool.submit("blocker", 0, lambda: build("blocker"))]
        assert started.wait(10)
        futures += [pool.submit(name, 1, partial(build, name)) for name in "abc"]
        futures.append(pool.submit("c", 0, lambda: build("c")))
        gate.set()
        assert [future.result(10) for future in futures] == ["blocker", "a", "b", "c", "c"]
    assert order == ["blocker", "c", "a", "b"]


def test_a_closed_pool_answers_all_who_wait() -> None:
    gate, started = threading.Event(), threading.Event()

    def build() -> str:
        started.set()
        gate.wait(10)
        return "built"

    pool = BuildPool[str](threads=1)
    running = pool.submit("running", 0, build)
    queued = pool.submit("queued", 0, build)
    assert started.wait(10)
    threading.Timer(0.05, gate.set).start()
    pool.close()
    for future in (running, queued):
        with pytest.raises(NotReady, match="stopping"):
            future.result(1)
    with pytest.raises(NotReady, match="stopping"):
        pool.submit("late", 0, build)
    pool.close()


def test_a_build_that_fails_says_so_to_who_waits() -> None:
    def build() -> str:
        raise ZeroDivisionError("by zero")

    with BuildPool[str](threads=1) as pool, pytest.raises(ZeroDivisionError):
        pool.submit("x", 0, build).result(10)


def _ref(**changes: object) -> ShardRef:
    return replace(
        ShardRef(domain="web", url="a", num_bytes=1, num_samples=1, text_bytes=1, sha256="0" * 64),
        **changes,  # type: ignore[arg-type]
    )


def test_a_shard_whose_scheme_is_not_read_is_lost_with_a_reason(tmp_path: Path) -> None:
    with _cache(tmp_path / "c", None) as cache:
        assert "has the scheme 'pipe'" in cache.get(_ref(url="pipe:rm x")).lost
