"""A ledger as a controller would have written it, for what reads ledgers."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np

from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind, observation_body, plan_entry, seal_entry
from controller.observation import StepObservation
from protos.planbook import PlanBook
from protos.types import Mixture, Plan, Step

DOMAINS = ("code", "web", "prose")
GLOBAL_SEQUENCES = 16


def write_ledger(path: Path, *, num_steps: int, plan_every: int = 5) -> tuple[Plan, ...]:
    """Write a run whose mixture drifts from the first domain to the last."""
    book = PlanBook(global_sequences=GLOBAL_SEQUENCES)
    rng = np.random.default_rng(0)
    with Ledger(path, now=count(0.0).__next__) as ledger:
        for step in range(num_steps):
            if step % plan_every == 0:
                drift = step / num_steps
                carry = book.carry(Step(step)) if book.plans else np.zeros(3, dtype=np.int64)
                plan = Plan(
                    version=len(book.plans),
                    first_step=Step(step),
                    mixture=Mixture.from_shares((0.7 - 0.5 * drift, 0.2, 0.1 + 0.5 * drift)),
                    carry_q32=tuple(carry.tolist()),
                )
                book.add(plan)
                ledger.commit([plan_entry(plan, reason="policy")])
            ledger.commit(
                [
                    seal_entry(step, carry_after=None, observed_through=step - 1),
                    _step(book, step, num_steps, rng),
                ]
            )
    return book.plans


def _step(book: PlanBook, step: int, num_steps: int, rng: np.random.Generator) -> Entry:
    sequences = book.counts(Step(step))
    tokens = sequences * 32
    mean = 3 + 5 * np.exp(-step / 40) * np.array([1.0, 0.8, 1.2]) + rng.normal(0, 0.1, 3)
    gradients = rng.normal(0, 1, (3, 50)) + np.array([[1.0], [0.8], [-0.3]])
    scaled = gradients * tokens[:, None]
    observation = StepObservation(
        step=Step(step),
        num_steps=num_steps,
        planned=np.asarray(book.plan_at(Step(step)).mixture.shares),
        sequences=sequences,
        tokens=tokens,
        loss_sum=mean * tokens,
        alignment=scaled @ scaled.T,
        weight_norms=np.zeros(0),
        update_norms=np.zeros(0),
    )
    body = {
        "observation": observation_body(observation),
        "to_policy": True,
        "proposed_step": step + 2,
    }
    return Entry(kind=Kind.STEP, step=step, body=body)
