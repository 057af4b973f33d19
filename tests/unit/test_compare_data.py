"""Splits by document hash: disjoint, stable, and nothing held out is trained on."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer

from deploy.compare.data import PreparedData, prepare_data
from deploy.compare.spec import CompareSpec
from deploy.compare.splits import Split, SplitDocuments, SplitShares, split_of
from deploy.documents import Document
from deploy.progress import Progress
from deploy.tokenizer import END_OF_TEXT
from protos.errors import ConfigError, DataError
from tests.fakes_compare import DOMAINS, small_spec
from tests.harness_runs import write_corpus

SHARES = SplitShares(policy_validation=0.2, test=0.2)


def documents(texts: Iterable[str]) -> list[Document]:
    return [Document(text, "somewhere") for text in texts]


@given(st.lists(st.text(max_size=40), max_size=40))
def test_every_document_is_in_one_split_whatever_its_place(texts: list[str]) -> None:
    shuffled = random.Random(1).sample(texts, len(texts))
    found = {
        split: [each.text for each in SplitDocuments(documents(texts), split, SHARES)]
        for split in Split
    }
    again = {
        split: [each.text for each in SplitDocuments(documents(shuffled), split, SHARES)]
        for split in Split
    }
    assert sorted(sum(found.values(), [])) == sorted(texts)
    assert {split: sorted(each) for split, each in found.items()} == {
        split: sorted(each) for split, each in again.items()
    }
    train, validation, test = (set(found[split]) for split in Split)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_shares_are_met_and_growing_one_moves_no_test_document() -> None:
    texts = [f"document {number}" for number in range(4000)]
    num = {split: sum(split_of(text, SHARES) is split for text in texts) for split in Split}
    # The standard deviation of a count at a chance of 0.2 is 25.
    assert num[Split.TEST] == pytest.approx(800, abs=125)
    assert num[Split.POLICY_VALIDATION] == pytest.approx(800, abs=125)
    wider = SplitShares(policy_validation=0.4, test=0.2)
    assert all(
        (split_of(text, SHARES) is Split.TEST) == (split_of(text, wider) is Split.TEST)
        for text in texts
    )


def prepared(source: Path, out: Path, **changes: object) -> tuple[CompareSpec, PreparedData]:
    spec = small_spec(source, {"uniform": {"name": "uniform"}}, **changes)
    return spec, prepare_data(spec, out, Progress(Console(quiet=True)))


def packed_texts(folder: Path) -> list[str]:
    texts = []
    for path in sorted(folder.glob("shards/*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                texts.append(file.read().decode())
    return texts


def source_texts(source: Path) -> list[str]:
    return [
        json.loads(line)["text"]
        for path in source.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]


def test_held_out_tokens_are_as_many_of_each_domain_and_of_no_document_that_is_packed(
    tmp_path: Path,
) -> None:
    source = write_corpus(tmp_path / "corpus")
    # The same document in two domains: both copies must be in the same split.
    copied = next(
        f"a document that is in two domains, number {number} " * 9
        for number in range(99)
        if split_of(f"a document that is in two domains, number {number} " * 9, SHARES)
        is Split.TEST
    )
    for name in DOMAINS[:2]:
        with (source / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"text": copied}) + "\n")
    spec, data = prepared(source, tmp_path / "out")
    held_out = data.held_out(spec)
    assert held_out.test.shape == (3, 4, 17)
    assert held_out.policy_validation.shape == (3, 3, 17)
    tokenizer = Tokenizer.from_file(str(data.tokenizer))
    texts = packed_texts(data.folder)
    assert copied not in texts
    assert len(texts) > 60
    assert all(split_of(text, SHARES) is Split.TRAIN for text in texts)
    tested = [text for text in source_texts(source) if split_of(text, SHARES) is Split.TEST]
    for row in held_out.test.reshape(-1, 17):
        # What lies between two end-of-text tokens is a piece of one held-out document.
        for piece in tokenizer.decode(row.tolist(), skip_special_tokens=False).split(END_OF_TEXT):
            assert any(piece in text for text in tested)


def test_packing_the_same_documents_in_other_files_changes_no_split(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus")
    _, data = prepared(source, tmp_path / "out")
    for name in DOMAINS:
        lines = (source / f"{name}.jsonl").read_text().splitlines()
        (source / f"{name}.jsonl").unlink()
        (source / name).mkdir()
        for number, part in enumerate((lines[40:], lines[:40])):
            (source / name / f"{number}.jsonl").write_text("\n".join(part) + "\n")
    _, again = prepared(source, tmp_path / "again")
    assert sorted(packed_texts(again.folder)) == sorted(packed_texts(data.folder))


def test_prepared_data_is_made_once_and_refused_for_other_settings(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus")
    folder = tmp_path / "shared"
    data_of = {"source": str(source), "vocab_size": 320, "prepared": str(folder)}
    data_of["splits"] = {"test": 0.2, "policy_validation": 0.2}
    few = {"test_sequences": 2, "validation_sequences": 2}
    _, data = prepared(source, tmp_path / "a", data={**data_of, **few})
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    spec, _ = prepared(source, tmp_path / "b", data={**data_of, **few, "test_sequences": 3})
    # Another number of held-out sequences is one more file, and no other has changed.
    assert data.held_out(spec).test.shape[1] == 3
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    with pytest.raises(ConfigError, match=r"vocab_size.*another data\.prepared"):
        prepared(source, tmp_path / "c", data={**data_of, **few, "vocab_size": 330})


def test_a_split_that_is_too_small_is_refused_by_name(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus")
    data = {
        "source": str(source),
        "vocab_size": 320,
        "splits": {"test": 0.2, "policy_validation": 0.2},
        "test_sequences": 4000,
        "validation_sequences": 1,
    }
    with pytest.raises(DataError, match=r"domain 'code' has .* lower data\.test_sequences"):
        prepared(source, tmp_path / "out", data=data)


def test_the_choice_of_held_out_sequences_is_the_same_each_time(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus")
    spec, data = prepared(source, tmp_path / "a")
    _, again = prepared(source, tmp_path / "b")
    np.testing.assert_array_equal(data.held_out(spec).test, again.held_out(spec).test)
