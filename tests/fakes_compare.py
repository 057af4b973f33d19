"""Comparisons for tests: a small one that really trains, and records with numbers made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.compare.record import Evaluation, Interval, TrialRecord
from deploy.compare.spec import CompareSpec, parse_spec

DOMAINS = ("code", "mail", "prose")


def small_spec(source: Path, arms: dict[str, Any], **changes: Any) -> CompareSpec:
    """Return a comparison that trains for seconds on `write_corpus`'s three domains."""
    document: dict[str, Any] = {
        "data": {
            "source": str(source),
            "vocab_size": 320,
            "splits": {"test": 0.2, "policy_validation": 0.2},
            "test_sequences": 4,
            "validation_sequences": 3,
        },
        "steps": 12,
        "seeds": [0],
        "arms": arms,
        "batch": {
            "global_sequences": 8,
            "sequence_length": 16,
            "lanes": 4,
            "window_samples": 4,
        },
        "training": {"model": "nano", "warmup_steps": 2},
        "evaluation": {"every": 4, "smoothing": 1},
        "guard": {"min_share": 0.01},
    }
    return parse_spec({**document, **changes}, source="a test")


SMALL_ACODM = {"name": "acodm", "width": 8, "depth": 1, "batch_size": 4, "warmup_steps": 3}


def made_up_record(arm: str, seed: int, losses: list[list[float]], **changes: Any) -> TrialRecord:
    """Return a record whose test losses, [evaluations, domains], are given; one every 10 steps."""
    num_domains = len(losses[0])
    even = [1 / num_domains] * num_domains
    values: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "policy": {"name": arm},
        "model": "nano",
        "parameters": 2000,
        "matrix_parameters": 1000,
        "steps": 10 * (len(losses) - 1),
        "tokens_a_step": 100,
        "domains": list(DOMAINS[:num_domains]),
        "natural": [0.8, 0.2][:num_domains],
        "epochs": [0.5] * num_domains,
        "evaluations": [
            Evaluation(step=10 * index, test_loss=row, wall_s=2.0 * index, cpu_s=1.0 * index)
            for index, row in enumerate(losses)
        ],
        "intervals": [
            Interval(
                first_step=10 * index,
                num_steps=10,
                planned=even,
                executed=even,
                train_loss=[1.0] * num_domains,
                reward=[None] * num_domains,
                reward_spread=None,
                reward_noise=None,
                diagnostics={},
            )
            for index in range(len(losses) - 1)
        ],
        "max_share_error_sequences": 0.5,
        "held_decisions": 0,
        "guard_changes": {},
        "decide_ms": {"p50": 1.0, "p99": 2.0},
        "probe_share": 0.0,
    }
    return TrialRecord(**{**values, **changes})
