"""Documents of batches over real gRPC, and attention that is kept within them."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import trainer_client
from protos.errors import InvalidMessage
from protos.spec import BEST_FIT, CONCATENATE, PACKINGS
from protos.types import StepBatch
from tests.fakes_consumer import PLENTY_S, consumed_run, write_corpus, write_run
from tests.fakes_trainer import FakeRun, make_spec, num_tokens_of, starts_of
from trainer_client import Batch, Documents, Session


def _connect(run: FakeRun, *, rank: int = 0, world_size: int = 1) -> Session:
    return trainer_client.connect(run.address, rank=rank, world_size=world_size)


def _train(session: Session, *, steps: int, documents: bool, micro_batch: int = 5) -> list[Batch]:
    taken = []
    for batch in session.batches(micro_batch, documents=documents):
        taken.append(batch)
        if batch.last_of_step:
            session.end_step()
            if batch.step + 1 == steps:
                break
    return taken


def _documents(batch: Batch) -> Documents:
    assert batch.documents is not None
    return batch.documents


@pytest.mark.parametrize("world_size", [1, 5])
def test_each_rank_gets_the_documents_of_its_own_sequences(world_size: int) -> None:
    with FakeRun(make_spec()).serving() as run:
        for rank in range(world_size):
            with _connect(run, rank=rank, world_size=world_size) as session:
                batches = _train(session, steps=3, documents=True, micro_batch=2)
            for batch in batches:
                _check_by_the_book(run, batch)
        assert all(opening.documents for worker in run.workers for opening in worker.openings)


def _check_by_the_book(run: FakeRun, batch: Batch) -> None:
    length = run.spec.sequence_length
    segments = [0]
    for row, slot in enumerate(batch.slots):
        padding = num_tokens_of(run.spec, batch.step, slot)
        begins = {0, padding, *starts_of(run.spec, batch.step, slot)} & set(range(length))
        ids: list[int] = []
        places: list[int] = []
        for place in range(length):
            new = place in begins
            ids.append(0 if place >= padding else (ids[-1] if ids else 0) + new)
            places.append(0 if new else places[-1] + 1)
        assert _documents(batch).document_ids[row].tolist() == ids
        assert _documents(batch).position_ids[row].tolist() == places
        segments += [row * length + place for place in sorted(begins)[1:]] + [(row + 1) * length]
    if batch.slots:
        assert _documents(batch).cu_seqlens.tolist() == segments
        assert _documents(batch).max_seqlen == max(b - a for a, b in pairwise(segments))
    else:  # a filler has the shape of its sequence and nothing that counts
        assert _documents(batch).cu_seqlens[-1] == length
        assert not batch.loss_mask.any()


def test_who_does_not_ask_gets_none_and_none_is_sent() -> None:
    with FakeRun(make_spec()).serving() as run, _connect(run) as session:
        assert all(each.documents is None for each in _train(session, steps=1, documents=False))
        with pytest.raises(ValueError, match="first called with documents=False, now with"):
            session.batches(documents=True)
        assert not any(opening.documents for worker in run.workers for opening in worker.openings)


@pytest.mark.parametrize("documents", [False, True])
def test_with_best_fit_no_document_is_asked_how_the_next_one_begins(documents: bool) -> None:
    with FakeRun(make_spec(packing=BEST_FIT)).serving() as run, _connect(run) as session:
        for batch in _train(session, steps=3, documents=documents):
            assert (batch.documents is not None) == documents
            for row, slot in enumerate(batch.slots):
                last = num_tokens_of(run.spec, batch.step, slot)
                starts = starts_of(run.spec, batch.step, slot)
                expected = [
                    label < last and label not in starts
                    for label in range(1, run.spec.sequence_length + 1)
                ]
                assert batch.loss_mask[row].tolist() == expected
        assert session._reporter.flush(timeout_s=10)


@pytest.mark.parametrize("documents", [False, True])
def test_documents_that_were_not_asked_for_or_did_not_come_end_training(documents: bool) -> None:
    def mangle(batch: StepBatch) -> StepBatch:
        lanes = tuple(dataclasses.replace(lane, documents=None) for lane in batch.lanes)
        return dataclasses.replace(batch, lanes=lanes)

    with FakeRun(make_spec()).serving() as run:
        for worker in run.workers:
            worker.mangle = mangle if documents else worker.mangle
            worker.always_documents = not documents
        with (
            _connect(run) as session,
            pytest.raises(InvalidMessage, match=r"asked for, and did (not )?come"),
        ):
            _train(session, steps=1, documents=documents)


def test_attention_within_documents_is_attention_to_each_document_alone() -> None:
    torch.manual_seed(0)
    with FakeRun(make_spec(sequence_length=9)).serving() as run, _connect(run) as session:
        (batch, *_) = _train(session, steps=1, documents=True, micro_batch=12)
    documents = _documents(batch)
    sequences, length = batch.tokens.shape
    query, key, value = torch.randn(3, sequences * length, 2, 8).unbind()

    # As `flash_attn_varlen_func` does it: flattened, segment by segment, causal within each.
    alone = torch.empty_like(query)
    bounds = documents.cu_seqlens.tolist()
    assert len(bounds) > sequences + 1
    assert documents.max_seqlen == max(end - first for first, end in pairwise(bounds))
    for first, end in pairwise(bounds):
        q, k, v = (each[first:end].transpose(0, 1) for each in (query, key, value))
        alone[first:end] = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    # As a mask of document ids does it: [sequences, heads, sequence_length, sequence_length].
    ids = documents.document_ids
    mask = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
    q, k, v = (each.view(sequences, length, 2, 8).transpose(1, 2) for each in (query, key, value))
    masked = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(masked.transpose(1, 2).reshape(alone.shape), alone)


def test_a_transformers_model_keeps_documents_apart_by_their_positions() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with FakeRun(make_spec(sequence_length=9)).serving() as run, _connect(run) as session:
        (batch, *_) = _train(session, steps=1, documents=True, micro_batch=12)
    documents = _documents(batch)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    flat = (batch.tokens % 64).reshape(1, -1)
    with torch.no_grad():
        together = model(
            input_ids=flat, position_ids=documents.position_ids.reshape(1, -1), use_cache=False
        ).logits
        for first, end in pairwise(documents.cu_seqlens.tolist()):
            alone = model(input_ids=flat[:, first:end], use_cache=False).logits
            torch.testing.assert_close(together[:, first:end], alone)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_from_a_real_worker_are_those_of_the_shards(packing: str, tmp_path: Path) -> None:
    # No token but 0, the end of text, occurs twice, and those of a document follow one another.
    patterns = write_corpus(tmp_path / "data")
    run_file = write_run(tmp_path / "out", patterns, batch={"packing": packing}, steps=20)
    divided = whole = 0
    with (
        consumed_run(run_file) as run,
        trainer_client.connect(run.address, rank=0, world_size=1, timeout_s=PLENTY_S) as session,
    ):
        assert session.spec.packing == packing
        for batch in _train(session, steps=20, documents=True, micro_batch=7):
            documents, tokens = _documents(batch), batch.tokens.flatten()
            counts = batch.loss_mask.flatten()
            is_padding = documents.document_ids.flatten() == 0
            for first, end in pairwise(documents.cu_seqlens.tolist()):
                segment = tokens[first:end]
                if is_padding[first]:
                    assert is_padding[first:end].all()
                    assert not segment.any()
                    assert not counts[first:end].any()
                    continue
                # One document, no more than its end-of-text at its end, each after the other.
                words = segment[: len(segment) - int(segment[-1] == 0)]
                assert words.all()
                assert torch.equal(words, words[:1] + torch.arange(len(words)))
                if packing == BEST_FIT:
                    assert counts[first : end - 1].all()
                is_row_end = end % batch.tokens.shape[1] == 0
                whole += bool(segment[-1] == 0)
                divided += bool(segment[-1] != 0) and is_row_end
                assert segment[-1] == 0 or is_row_end or is_padding[end]
    assert whole > 100
    assert divided > 20 or packing != CONCATENATE
