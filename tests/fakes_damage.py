"""Shards of every form, and the damage that is done to them."""

from __future__ import annotations

import gzip
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from loader_workers.convert import Converter, Documents
from loader_workers.index import build_index
from protos.dataset_index import ShardRef
from tests.fakes_loader import npy_bytes, shard_bytes, tokenize_words

ENDINGS = ("tar", "tar.gz", "tar.zst")


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A sound shard with its index entry and its tokens."""

    folder: Path
    ref: ShardRef
    data: bytes
    documents: list[list[int]]

    def converter(self, *, with_maps: bool = True, on_damage: str = "skip_sample") -> Converter:
        return Converter(
            tokenize=tokenize_words(),
            text_field="text",
            vocab_size=300,
            eot_id=201,
            dtype=np.dtype("<u2"),
            samples_folder=self.folder / "maps" if with_maps else None,
            on_damage=on_damage,
        )

    def read(self, data: bytes, **options: bool | str) -> Documents:
        """Convert other bytes in the shard's place."""
        Path(self.ref.url).write_bytes(data)
        return self.converter(**options).convert(self.ref)  # type: ignore[arg-type]

    def check(self, found: Documents) -> int:
        """Hold documents against the sound ones; return how many samples were left out.

        Each is the sound one, or left out with its reason. Nothing else is allowed.
        """
        cut = cut_documents(found)
        assert len(cut) == len(self.documents)
        if found.lost:
            assert not any(cut)
            return len(cut)
        reasons = dict(found.unreadable)
        for number, (got, sound) in enumerate(zip(cut, self.documents, strict=True)):
            if number in reasons:
                assert reasons[number]
                assert got == []
            else:
                assert got == sound, f"sample {number} has other tokens and nobody said so"
        return len(reasons)


def cut_documents(found: Documents) -> list[list[int]]:
    tokens, offsets = found.tokens.tolist(), found.offsets.tolist()
    return [tokens[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


def samples(seed: int, count: int) -> list[dict[str, bytes | str]]:
    """Return samples of every kind."""
    draw = random.Random(seed)
    made: list[dict[str, bytes | str]] = []
    for number in range(count):
        text = " ".join(f"w{draw.randrange(200)}" for _ in range(draw.randrange(1, 250)))
        ids = np.array([draw.randrange(200) for _ in range(draw.randrange(1, 250))])
        kinds: list[dict[str, bytes | str]] = [
            {"txt": text, "json": '{"source": "x"}'},
            {"json": f'{{"text": "{text}"}}'},
            {"jsonl": f'{{"text": "{text}"}}\n{{"text": "w1 w2"}}\n'},
            {"npy": npy_bytes(ids)},
            {"u16": ids.astype("<u2").tobytes()},
            {"u32": ids.astype("<u4").tobytes()},
        ]
        made.append({"__key__": f"{number:04d}", **kinds[number % len(kinds)]})
    return made


def make_sound(folder: Path, *, ending: str = "tar", count: int = 24, seed: int = 1) -> Sound:
    """Write a shard, index it, and read it once."""
    data = shard_bytes(samples(seed, count))
    if ending == "tar.gz":
        data = gzip.compress(data, mtime=0)
    elif ending == "tar.zst":
        data = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    path = folder / f"shard.{ending}"
    path.write_bytes(data)
    index = build_index(
        {"web": [str(path)]}, text_field="text", max_bad_share=0, samples_folder=folder / "maps"
    )
    (ref,) = index.shards("web")
    sound = Sound(folder=folder, ref=ref, data=data, documents=[])
    found = sound.read(data)
    assert not found.lost
    assert not found.unreadable
    return Sound(folder=folder, ref=ref, data=data, documents=cut_documents(found))


def damage(data: bytes, draw: random.Random) -> bytes:
    """Return other bytes: edits, holes, cuts, shifts, repeats, or several of them."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        size = max(len(changed), 1)
        at = draw.randrange(size)
        span = min(draw.choice([1, 2, 8, 512, 513, 4096, 20_000]), size - at)
        kind = draw.choice(["flip", "random", "zeros", "cut", "drop", "insert", "repeat", "swap"])
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "random":
            changed[at : at + span] = draw.randbytes(span)
        elif kind == "zeros":
            changed[at : at + span] = bytes(span)
        elif kind == "cut":
            del changed[at:]
        elif kind == "drop":
            del changed[at : at + span]
        elif kind == "insert":
            changed[at:at] = draw.randbytes(span)
        elif kind == "repeat":
            changed[at:at] = changed[at : at + span]
        elif kind == "swap":
            other = draw.randrange(size)
            block, there = changed[at : at + span], changed[other : other + span]
            if len(block) == len(there) and abs(at - other) >= span:
                changed[at : at + span], changed[other : other + span] = there, block
    return bytes(changed)


def try_damage(seed: int, cases: int, *, ending: str) -> tuple[int, int]:
    """Damage a shard in so many ways; return how many were detected and how many harmless."""
    draw = random.Random(seed)
    detected = harmless = 0
    with tempfile.TemporaryDirectory() as folder:
        sound = make_sound(Path(folder), ending=ending, seed=seed)
        for _ in range(cases):
            changed = damage(sound.data, draw)
            found = sound.read(changed)
            num_left_out = sound.check(found)
            if changed == sound.data:
                assert not num_left_out
                assert not found.damaged
                continue
            # Other bytes than the index knows never pass for the shard itself.
            assert found.lost or found.damaged
            detected += bool(num_left_out)
            harmless += not num_left_out
    return detected, harmless
