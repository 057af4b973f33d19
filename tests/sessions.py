"""A trainer's session on a run that is served here, and what must come out of it."""

from __future__ import annotations

from typing import Any

import trainer_client
from tests.fakes_trainer import (
    FakeRun,
    domain_of,
    num_tokens_of,
    sequence,
)
from trainer_client import Batch, Session


def connect(run: FakeRun, *, rank: int = 0, world_size: int = 1, **options: Any) -> Session:
    return trainer_client.connect(run.address, rank=rank, world_size=world_size, **options)


def train(session: Session, *, until: int | None = None, micro_batch: int = 4) -> list[Batch]:
    """Take every batch and end every step."""
    taken = []
    for batch in session.batches(micro_batch):
        taken.append(batch)
        if batch.last_of_step:
            session.end_step()
            if batch.step + 1 == until:
                break
    return taken


def check_by_the_book(run: FakeRun, batches: list[Batch]) -> list[tuple[int, int]]:
    """Hold every sequence against what its slot must be; return the (step, slot) seen."""
    seen = []
    for batch in batches:
        for row, slot in enumerate(batch.slots):
            expected = sequence(run.spec, batch.step, slot)
            assert batch.tokens[row].tolist() == expected[:-1].tolist()
            assert batch.labels[row].tolist() == expected[1:].tolist()
            assert batch.domain_ids[row] == domain_of(run.spec, batch.step, slot)
            num_labels = num_tokens_of(run.spec, batch.step, slot) - 1
            mask = [position < num_labels for position in range(run.spec.sequence_length)]
            assert batch.loss_mask[row].tolist() == mask
            seen.append((int(batch.step), slot))
    return seen


def every_slot(run: FakeRun, first_step: int = 0) -> list[tuple[int, int]]:
    steps = range(first_step, run.spec.num_steps)
    return [(step, slot) for step in steps for slot in range(run.spec.global_sequences)]
