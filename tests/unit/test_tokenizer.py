"""A tokenizer file is described once and understood, or refused in one sentence."""

from __future__ import annotations

import hashlib
import json

import pytest

from loader_workers.tokenize import make_tokenize
from protos.errors import TokenizerInvalid
from protos.tokenizer import describe_tokenizer
from tests.fakes_loader import EOT, tokenizer_json


def test_it_says_size_end_of_text_and_hash() -> None:
    data = tokenizer_json()
    info = describe_tokenizer(data, eot_token=EOT, source="tokenizer.json")
    assert (info.vocab_size, info.eot_id) == (202, 201)
    assert info.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"not json", b"{}", b"[1]", b'{"model": 3}'])
def test_a_file_that_is_not_a_tokenizer_is_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(TokenizerInvalid) as caught:
        describe_tokenizer(data, eot_token=EOT, source="data/tok.json")
    said = str(caught.value)
    assert said.startswith("data/tok.json is not a tokenizer file: ")
    assert "data.tokenizer must be" in said
    assert "\n" not in said


def test_a_tokenizer_without_the_end_of_text_token_is_refused() -> None:
    with pytest.raises(TokenizerInvalid, match=r"has no token '</s>'; set data.eot_token"):
        describe_tokenizer(tokenizer_json(), eot_token="</s>", source="tok.json")


def test_nothing_is_added_cut_or_padded() -> None:
    fields = json.loads(tokenizer_json())
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    fields["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    tokenize = make_tokenize(json.dumps(fields).encode())
    assert [ids.tolist() for ids in tokenize(["w0 w1 w2 w3", "", "w5"])] == [[1, 2, 3, 4], [], [6]]


def test_a_document_that_spells_the_end_of_text_does_not_end() -> None:
    (ids,) = make_tokenize(tokenizer_json())([f"w0 {EOT} w1"])
    assert 201 not in ids.tolist()
