"""Shards that are damaged when they are first indexed: what is whole arrives, nothing else does."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest
import zstandard

from loader_workers.convert import Converter
from loader_workers.index import build_index
from protos.dataset_index import ShardRef
from protos.errors import TooMuchLost
from tests.fakes_damage import cut_documents, samples
from tests.fakes_loader import shard_bytes, tokenize_words

BLOCK = 512
COUNT = 24

Made = list[dict[str, bytes | str]]


def _converter(maps: Path) -> Converter:
    return Converter(
        tokenize=tokenize_words(),
        text_field="text",
        vocab_size=300,
        eot_id=201,
        dtype=np.dtype("<u2"),
        samples_folder=maps,
    )


def _texts() -> Made:
    """Return samples of one kind: a text with its metadata."""
    return samples(3, 6 * COUNT)[::6]


def _headers(data: bytes) -> list[int]:
    return [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]


class Shards:
    """Damaged shards of one sound one, indexed and read for the first time."""

    def __init__(self, folder: Path, made: Made) -> None:
        self._folder = folder
        self._number = 0
        self._whole = folder / "whole.tar"
        self._whole.write_bytes(shard_bytes([{"__key__": "one", "txt": "w1"}]))
        self.data = shard_bytes(made)
        self.headers = _headers(self.data)
        self.documents = self.index(self.data)[1]
        assert len(self.documents) == COUNT
        assert all(self.documents)

    def index(
        self, data: bytes, *, ending: str = "tar", max_bad_share: float = 1.0
    ) -> tuple[ShardRef, list[list[int]]]:
        """Index some bytes and read them; return the entry and the samples' tokens."""
        self._number += 1
        path = self._folder / f"{self._number}.{ending}"
        path.write_bytes(data)
        maps = self._folder / "maps"
        index = build_index(
            {"web": [str(path), str(self._whole)]},
            text_field="text",
            max_bad_share=max_bad_share,
            samples_folder=maps,
        )
        ref = index.shards("web")[0]
        found = _converter(maps).convert(ref)
        documents = cut_documents(found)
        if not ref.quarantined:
            assert not found.damaged, "it is what the index says"
            assert len(found.unreadable) == ref.num_unreadable == documents.count([])
            assert bool(ref.num_unreadable) == bool(ref.damage)
        return ref, documents

    def check(self, data: bytes, *, ending: str = "tar") -> int:
        """Return how many samples arrive; each is one of the sound ones, and none comes twice."""
        _, documents = self.index(data, ending=ending)
        arrived = [document for document in documents if document]
        places = [self.documents.index(document) for document in arrived]
        assert len(set(places)) == len(places)
        return len(arrived)


@pytest.fixture(params=["texts", "every kind"])
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Shards:
    return Shards(tmp_path, _texts() if request.param == "texts" else samples(3, COUNT))


def test_every_cut_keeps_the_samples_before_it(shards: Shards) -> None:
    most = 0
    for end in shards.headers[1:]:
        arrived = shards.check(shards.data[:end])
        assert arrived >= most - 1
        most = max(most, arrived)
        assert shards.check(shards.data[: end + 300]) >= arrived - 1
        assert shards.check(shards.data[: end + BLOCK + 10]) >= arrived - 1
    assert most >= COUNT - 2


def test_a_flip_in_a_header_costs_its_sample_and_those_beside_it_at_most(shards: Shards) -> None:
    draw = random.Random(2)
    for header in shards.headers:
        changed = bytearray(shards.data)
        changed[header + draw.randrange(500)] ^= 1 << draw.randrange(8)
        assert shards.check(bytes(changed)) >= COUNT - 3


def test_a_header_that_is_gone_costs_its_sample_and_those_beside_it_at_most(
    shards: Shards,
) -> None:
    for header in shards.headers:
        for hole in (bytes(BLOCK), random.Random(header).randbytes(BLOCK)):
            changed = shards.data[:header] + hole + shards.data[header + BLOCK :]
            assert shards.check(changed) >= COUNT - 3


def test_bytes_that_are_missing_or_too_many_give_no_other_tokens(shards: Shards) -> None:
    draw = random.Random(6)
    for _ in range(80):
        at = draw.randrange(shards.headers[-1])
        span = draw.choice([1, 7, 100, 511, 513, 1500])
        missing = shards.data[:at] + shards.data[at + span :]
        more = shards.data[:at] + draw.randbytes(span) + shards.data[at:]
        again = shards.data[: at + span] + shards.data[at:]
        for changed in (missing, more, again):
            assert shards.check(changed) >= COUNT - 6


def test_two_archives_in_one_file_give_the_samples_of_both_but_for_one(tmp_path: Path) -> None:
    made = _texts()
    shards = Shards(tmp_path, made)
    # The zeros between them may be a hole that began in the sample before.
    assert shards.check(shard_bytes(made[:9]) + shard_bytes(made[9:])) == COUNT - 1


@pytest.mark.parametrize("ending", ["tar.gz", "tar.zst"])
def test_a_compressed_shard_gives_what_comes_out_before_its_damage(
    tmp_path: Path, ending: str
) -> None:
    shards = Shards(tmp_path, _texts())
    compress = gzip.compress if ending == "tar.gz" else zstandard.ZstdCompressor().compress
    packed = compress(shards.data)
    assert shards.check(packed, ending=ending) == COUNT
    tenths = [len(packed) * tenth // 10 for tenth in range(1, 10)]
    arrived = [shards.check(packed[:end], ending=ending) for end in tenths]
    assert arrived == sorted(arrived)
    # Damage to the archive inside a stream that is sound.
    flipped = bytearray(shards.data)
    flipped[shards.headers[10]] ^= 4
    assert shards.check(compress(bytes(flipped)), ending=ending) >= COUNT - 2


def test_a_sample_that_lost_its_text_is_not_read_from_its_metadata(tmp_path: Path) -> None:
    made: Made = [
        {"__key__": f"{n}", "json": f'{{"text": "w{n + 100}"}}', "txt": f"w{n}"} for n in range(9)
    ]
    data = bytearray(shard_bytes(made))
    (header,) = (at for at in _headers(bytes(data)) if data[at : at + 5] == b"4.txt")
    data[header] ^= 1
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    index = build_index(
        {"web": [str(path)]}, text_field="text", max_bad_share=0.9, samples_folder=tmp_path / "maps"
    )
    found = _converter(tmp_path / "maps").convert(index.shards("web")[0])
    arrived = [document for document in cut_documents(found) if document]
    texts = [tokenize_words()([f"w{n}"])[0].tolist() for n in range(9)]
    assert arrived == [*texts[:4], *texts[5:]]


def test_lost_samples_and_bytes_count_against_the_allowed_share(tmp_path: Path) -> None:
    shards = Shards(tmp_path, _texts())
    flipped = bytearray(shards.data)
    flipped[shards.headers[20]] ^= 1
    with pytest.raises(TooMuchLost, match=r"damaged.*data\.max_bad_share"):
        shards.index(bytes(flipped), max_bad_share=0.0)
    ref, documents = shards.index(bytes(flipped), max_bad_share=0.2)
    assert "damaged or cut off" in ref.damage
    assert ref.num_samples == len(documents)


def test_without_a_folder_for_maps_or_by_choice_it_is_left_out_whole(tmp_path: Path) -> None:
    shards = Shards(tmp_path, _texts())
    path = tmp_path / "cut.tar"
    path.write_bytes(shards.data[:-20_000])
    for options in ({}, {"samples_folder": tmp_path / "maps", "on_damage": "quarantine_shard"}):
        index = build_index(
            {"web": [str(path), str(tmp_path / "whole.tar")]},
            text_field="text",
            max_bad_share=1.0,
            **options,  # type: ignore[arg-type]  # a bag of options
        )
        assert [bool(ref.quarantined) for ref in index.shards("web")] == [True, False]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_thousand_damages_give_no_other_tokens(shards: Shards) -> None:
    draw = random.Random(11)
    fewest = COUNT
    for _ in range(1_000):
        changed = shards.data
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(len(changed) - 2000)
            span = draw.choice([1, 8, 100, 511, 513, 2000])
            kind = draw.choice(["cut", "drop", "insert", "repeat", "header"])
            if kind == "cut":
                changed = changed[: max(at, len(changed) // 2)]
            elif kind == "drop":
                changed = changed[:at] + changed[at + span :]
            elif kind == "insert":
                changed = changed[:at] + draw.randbytes(span) + changed[at:]
            elif kind == "repeat":
                changed = changed[: at + span] + changed[at:]
            elif found := _headers(changed):
                at = draw.choice(found)
                changed = changed[:at] + draw.randbytes(draw.choice([4, 512])) + changed[at + 4 :]
        fewest = min(fewest, shards.check(changed))
    print(f"1000 damages: {fewest} to {COUNT} of {COUNT} samples arrived, none with other tokens")
