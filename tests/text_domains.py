"""Eight kinds of real text that any Python installation holds, as batches of bytes."""

from __future__ import annotations

import ast
import contextlib
import pydoc_data.topics
import sysconfig
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from protos.types import Step
from trainer_client import Batch

NUM_TEXT_DOMAINS = 8
_DOMAIN_BYTES = 200_000


def _read(pattern: str) -> str:
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob(pattern)):
        with contextlib.suppress(UnicodeDecodeError):
            found.append(path.read_text())
        if sum(map(len, found)) > _DOMAIN_BYTES:
            break
    return "\n".join(found)


def _docstrings() -> str:
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found.append(ast.get_docstring(node) or "")
        if sum(map(len, found)) > _DOMAIN_BYTES:
            break
    return "\n".join(found)


def text_domains() -> list[NDArray[np.int64]]:
    """Return the bytes of eight kinds of text that any Python holds."""
    texts = [
        _read("asyncio/*.py"),
        _read("encodings/cp*.py"),
        _read("html/entities.py"),
        _read("email/*.py"),
        _read("unittest/*.py"),
        _docstrings(),
        "\n".join(pydoc_data.topics.topics.values()),
        "\n".join(f"{a} + {b} = {a + b}" for a in range(150) for b in range(60)),
    ]
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]


def text_batch(
    domains: list[NDArray[np.int64]],
    step: int,
    rng: np.random.Generator,
    *,
    per_domain: int,
    length: int,
) -> Batch:
    """Return a step of one micro-batch: `per_domain` sequences of each kind."""
    rows, ids = [], []
    for domain, text in enumerate(domains):
        for first in rng.integers(0, len(text) - length - 1, per_domain):
            rows.append(text[first : first + length + 1])
            ids.append(domain)
    tokens = torch.from_numpy(np.stack(rows))
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=torch.ones(len(ids), length, dtype=torch.bool),
        domain_ids=torch.tensor(ids),
        step=Step(step),
        slots=range(len(ids)),
        first_of_step=True,
        last_of_step=True,
        plan_version=0,
        degraded=False,
    )
