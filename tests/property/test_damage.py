"""Damage is detected or harmless: a sample arrives as it was, or is left out and said to be."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from loader_workers.cache import ShardCache
from loader_workers.convert import Documents
from loader_workers.tar import BLOCK
from tests.fakes_damage import ENDINGS, Sound, cut_documents, damage, make_sound, try_damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return make_sound(tmp_path_factory.mktemp("sound"))


def _content_end(sound: Sound) -> int:
    return len(sound.data.rstrip(b"\0"))


@pytest.mark.fault_row(24, "a shard cut at each block of 512 bytes")
def test_every_cut_at_a_block_keeps_all_samples_before_it(
    sound: Sound, record_injections: Callable[..., None]
) -> None:
    before = -1
    ends = range(0, _content_end(sound) + BLOCK, BLOCK)
    for end in ends:
        arrived = len(sound.documents) - sound.check(sound.read(sound.data[:end]))
        assert arrived >= before, "a longer shard gave fewer samples"
        before = arrived
    assert before == len(sound.documents)
    record_injections(len(ends))


@pytest.mark.fault_row(24, "a shard cut within a member")
def test_every_cut_within_a_member_costs_what_is_cut_off(
    sound: Sound, record_injections: Callable[..., None]
) -> None:
    draw = random.Random(4)
    for _ in range(60):
        end = draw.randrange(_content_end(sound))
        assert sound.check(sound.read(sound.data[:end])) >= 1
    record_injections(60)


@pytest.mark.fault_row(24, "a shard cut at each block of 512 bytes, without maps of its samples")
def test_a_cut_shard_is_named_with_what_it_has_and_what_it_should(
    sound: Sound, record_injections: Callable[..., None]
) -> None:
    ends = range(0, len(sound.data), BLOCK)
    for end in ends:
        assert sound.read(sound.data[:end], with_maps=False).lost == (
            f"{sound.ref.url} has {end} bytes, the dataset index says {len(sound.data)}"
        )
    record_injections(len(ends))


def test_a_flipped_byte_costs_one_sample_at_most(sound: Sound) -> None:
    draw = random.Random(5)
    for _ in range(150):
        at = draw.randrange(len(sound.data))
        changed = bytearray(sound.data)
        changed[at] ^= draw.randrange(1, 256)
        found = sound.read(bytes(changed))
        assert found.damaged
        assert sound.check(found) <= 1


def test_a_destroyed_header_costs_no_sample_whose_bytes_are_whole(sound: Sound) -> None:
    changed = bytearray(sound.data)
    changed[10 * BLOCK : 11 * BLOCK] = bytes(BLOCK)
    assert sound.check(sound.read(bytes(changed))) <= 1


@pytest.mark.parametrize("size", [BLOCK, 4 * BLOCK, 20_000])
def test_a_hole_of_zeros_costs_what_it_covers(sound: Sound, size: int) -> None:
    draw = random.Random(size)
    for _ in range(20):
        at = draw.randrange(_content_end(sound) - size)
        found = sound.read(sound.data[:at] + bytes(size) + sound.data[at + size :])
        assert found.damaged
        assert sound.check(found) <= size // BLOCK + 2


@pytest.mark.parametrize("more", [b"\0" * BLOCK, b"x" * 1000, b"\x80\x04cos\nsystem\n."])
def test_a_shard_longer_than_its_index_gives_all_its_samples(sound: Sound, more: bytes) -> None:
    found = sound.read(sound.data + more)
    assert found.damaged
    assert sound.check(found) == 0


def test_without_maps_or_by_choice_a_damaged_shard_is_left_out_whole(sound: Sound) -> None:
    changed = sound.data[:-20_000]
    assert sound.read(changed, with_maps=False).lost
    assert sound.read(changed, on_damage="quarantine_shard").lost
    assert not sound.read(changed).lost


def test_what_is_left_of_a_damaged_shard_is_counted_and_not_kept_for_a_mended_one(
    tmp_path: Path,
) -> None:
    sound = make_sound(tmp_path)
    path = Path(sound.ref.url)

    def through_cache(data: bytes) -> tuple[Documents, list[int]]:
        path.write_bytes(data)
        with ShardCache(
            tmp_path / "cache",
            budget_bytes=1 << 30,
            converter=sound.converter(),
            tokenizer_sha256="words",
        ) as cache:
            got = cache.get(sound.ref)
            left_out = [item.sample for item in cache.quarantines()]
            return Documents(offsets=got.offsets.view("<u8"), tokens=got.tokens.copy()), left_out

    cut, left_out = through_cache(sound.data[:-30_000])
    assert 0 < len(left_out) < len(sound.documents)
    assert left_out == [n for n, tokens in enumerate(cut_documents(cut)) if not tokens]
    mended, left_out = through_cache(sound.data)
    assert left_out == []
    assert cut_documents(mended) == sound.documents


def test_maps_that_are_damaged_are_not_trusted(tmp_path: Path) -> None:
    sound = make_sound(tmp_path)
    (maps,) = (tmp_path / "maps").rglob("*.samples")
    whole = maps.read_bytes()
    for at in range(0, len(whole), 37):
        changed = bytearray(whole)
        changed[at] ^= 255
        maps.write_bytes(bytes(changed))
        assert sound.read(sound.data[:-30_000]).lost
    maps.write_bytes(whole[:-1])
    assert sound.read(sound.data[:-30_000]).lost


@pytest.mark.parametrize("ending", ENDINGS)
def test_random_damage_is_detected_or_harmless(ending: str) -> None:
    detected, harmless = try_damage(7, 150, ending=ending)
    assert detected > 75
    assert detected + harmless >= 140


@pytest.mark.long
@pytest.mark.fault_row(25, "edits, cuts, holes, shifts of 20,000 shards")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ending", ENDINGS)
def test_twenty_thousand_damages_are_detected_or_harmless(
    ending: str, record_injections: Callable[..., None]
) -> None:
    detected = harmless = 0
    for seed in range(100, 110):
        found = try_damage(seed, 720, ending=ending)
        detected += found[0]
        harmless += found[1]
    # A few edits put back what was there: those change nothing, and are not counted.
    assert detected + harmless >= 6667
    record_injections(detected + harmless, f"{detected} left out samples, {harmless} harmless")


def test_damage_changes_something() -> None:
    draw = random.Random(1)
    assert sum(damage(b"x" * 5000, draw) != b"x" * 5000 for _ in range(100)) > 80
