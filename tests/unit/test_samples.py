"""Samples are grouped as webdataset groups them, and an unreadable one says why."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from loader_workers import samples as samples_module
from loader_workers.samples import Sample, read_samples, split_name
from loader_workers.tar import TarReader
from tests.fakes_loader import json_sample, npy_bytes, shard_bytes


def _read(
    samples: Sequence[Mapping[str, bytes | str]], *, text_field: str = "text"
) -> list[Sample]:
    data = shard_bytes(samples)
    reader = TarReader(io.BytesIO(data), num_bytes=len(data), shard="s.tar")
    return list(read_samples(reader, text_field=text_field))


def _reason(**members: bytes | str) -> str:
    (sample,) = _read([{"__key__": "k", **members}])
    assert sample.document is None
    return sample.reason


@given(name=st.text(alphabet="ab./_X", max_size=12))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    key, ending = webdataset.tariterators.base_plus_ext(name)
    split = split_name(name)
    if not name.startswith("__"):
        assert split == (None if key is None else (key, ending.lower()))


@pytest.mark.parametrize("name", ["__meta__", "__dir__/x.txt", "README"])
def test_names_that_belong_to_no_sample_are_skipped(name: str) -> None:
    assert split_name(name) is None


def test_members_of_a_key_that_follow_one_another_are_one_sample() -> None:
    found = _read(
        [
            {"__key__": "a", "txt": "one", "cls": "1", "meta.json": "{}"},
            {"__key__": "b", "TXT": "two"},
            {"__key__": "a", "txt": "three"},
        ]
    )
    assert [(sample.key, sample.document) for sample in found] == [
        ("a", "one"),
        ("b", "two"),
        ("a", None),  # a key names one sample of a shard
    ]


def test_the_lines_of_a_jsonl_are_documents_of_one_sample() -> None:
    lines = b'{"text": "one"}\n\n{"text": "two"}\n'
    (found,) = _read([{"__key__": "a", "jsonl": lines}])
    assert found.document == ("one", "two")
    (torn,) = _read([{"__key__": "a", "jsonl": lines[:-4]}])
    assert "its JSON cannot be parsed" in torn.reason


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"\xff\xfe"}, "its text is not UTF-8 at byte 0"),
        ({"json": "{"}, "its JSON cannot be parsed"),
        ({"json": "[" * 100_000}, "its JSON cannot be parsed"),
        ({"json": '{"body": "x"}'}, "no text in the field 'text' (data.text_field)"),
        ({"json": '{"text": 3}'}, "no text in the field 'text'"),
        ({"json": "[]"}, "no text in the field 'text'"),
        ({"json": '{"text": "\\ud800"}'}, "half a surrogate pair at 0"),
        ({"u16": b"abc"}, "3 bytes are no whole number of .u16 token ids"),
        ({"npy": b"nothing"}, "its .npy has no valid header"),
        ({"npy": npy_bytes(np.zeros((2, 2), np.int32))}, "must be a 1-D array of integers"),
        ({"npy": npy_bytes(np.zeros(2))}, "must be a 1-D array of integers"),
        ({"npy": npy_bytes(np.arange(9))[:-3]}, ".npy claims 9 token ids and holds 69 bytes"),
        ({"npy": npy_bytes(np.array([-1, 2]))}, "token ids must be in 0..2^32-1, got -1..2"),
        ({"jpg": b"x", "cls": "3"}, "none of its members ('cls', 'jpg') ends in .npy"),
    ],
)
def test_an_unreadable_sample_says_why(members: dict[str, bytes | str], reason: str) -> None:
    said = _reason(**members)
    assert said.startswith("sample 'k': ")
    assert reason in said


class _Trap:
    """Leaves a mark on the disk when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("ending", ["pyd", "pkl", "pickle", "pth", "pt", "npz", "npy"])
def test_nothing_in_a_shard_is_ever_unpickled(ending: str, tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    if ending == "npy":
        sink = io.BytesIO()
        np.save(sink, np.array([_Trap(mark)], dtype=object), allow_pickle=True)
        payload = sink.getvalue()
    else:
        payload = pickle.dumps(_Trap(mark))
    (alone,) = _read([{"__key__": "k", ending: payload}])
    assert alone.document is None
    assert not mark.exists()


def test_a_pickle_beside_text_is_ignored() -> None:
    (sample,) = _read([{"__key__": "k", "pkl": pickle.dumps([1]), "txt": "text"}])
    assert sample.document == "text"


def test_a_document_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MAX_MEMBER_BYTES", 10)
    assert _reason(txt="x" * 11) == "sample 'k': its member .txt has 11 bytes, more than 10"


def test_a_claimed_array_shape_allocates_nothing() -> None:
    honest = npy_bytes(np.arange(4))
    lying = honest.replace(b"(4,), }       ", b"(4000000000,), }")[: len(honest)]
    assert b"4000000000" in lying
    assert "claims 4000000000 token ids" in _reason(npy=lying)


def test_the_text_field_can_be_chosen() -> None:
    (sample,) = _read([json_sample("k", {"body": "here", "text": "not here"})], text_field="body")
    assert sample.document == "here"


def test_raw_token_ids_are_little_endian() -> None:
    found = _read(
        [{"__key__": "a", "u16": b"\x01\x02"}, {"__key__": "b", "u32": b"\x01\x00\x00\x01"}]
    )
    assert [np.asarray(sample.document).tolist() for sample in found] == [[513], [16777217]]


def test_tokens_go_before_text_and_text_before_metadata() -> None:
    meta, both = _read(
        [
            {"__key__": "a", "json": '{"text": "meta"}', "txt": "text"},
            {"__key__": "b", "txt": "text", "npy": npy_bytes(np.array([1, 2, 3], np.int64))},
        ]
    )
    assert meta.document == "text"
    assert np.asarray(both.document).tolist() == [1, 2, 3]
