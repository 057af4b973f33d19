"""A trainer with a live session beside a DataLoader of its own, whose workers it forks or spawns.

Trains to the run's end and says on stdout, as one JSON line, which steps it trained and what its
DataLoader gave. `python -m tests.faults.forking_trainer ADDRESS USE NUM_WORKERS CONTEXT PERSISTENT`
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from protos.client import ControlClient
from protos.types import Generation
from trainer_client import Batch, Session, connect

HANGS_AFTER_S = 50
Items = list[list[int]]


class Aside(IterableDataset[int]):
    """What a trainer reads beside the run, a validation set for instance."""

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        yield from range(100) if worker is None else range(worker.id, 100, worker.num_workers)


class UsesSession(IterableDataset[int]):
    """Reads the run's batches from wherever it is iterated."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __iter__(self) -> Iterator[int]:
        return (int(batch.step) for batch in self._session.batches(64))


class UsesBatches(IterableDataset[int]):
    """Goes on with batches that its parent began to read, or is about to."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[int]:
        return (int(batch.step) for batch in self._batches)


class Connects(IterableDataset[int]):
    """Has a session of its own in each process that iterates it."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __iter__(self) -> Iterator[int]:
        with connect(self._address, rank=0, world_size=1) as session:
            for batch in session.batches(64):
                yield int(batch.step)
                session.end_step()


class AsksController(IterableDataset[int]):
    """Calls by a client that was used before this process was forked from its parent."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def __iter__(self) -> Iterator[int]:
        for _ in range(3):
            yield len(self._client.locate(Generation(1)).endpoints)


def main() -> None:
    """Train, and read what the arguments name beside it."""
    address, use, num_workers, context, persistent = sys.argv[1:]
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    torch.set_num_threads(1)
    client = ControlClient(address)
    client.locate(Generation(1))
    session = connect(address, rank=0, world_size=1)
    batches = session.batches(64)
    steps = [int(next(batches).step)]
    session.end_step()
    make: dict[str, Callable[[], IterableDataset[int]]] = {
        "aside": Aside,
        "session": lambda: UsesSession(session),
        "batches": lambda: UsesBatches(batches),
        "ahead": lambda: UsesBatches(session.batches(64, ahead=True)),
        "connects": lambda: Connects(address),
        "client": lambda: AsksController(client),
    }
    workers = int(num_workers)
    loader = DataLoader(
        make[use](),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context if workers else None,
        persistent_workers=persistent == "True" and workers > 0,
    )
    read: list[object] = []
    for batch in batches:
        steps.append(int(batch.step))
        if batch.step in (1, 3):
            read.append(_read(loader))
        session.end_step()
    session.close()
    client.close()
    print(json.dumps({"steps": steps, "read": read, "pid": os.getpid()}), flush=True)


def _read(loader: DataLoader[int]) -> object:
    """Return what a loader gives, or the last line of what it fails with."""
    try:
        return sorted(int(each) for each in loader)
    except Exception as error:
        return str(error).strip().splitlines()[-1]


if __name__ == "__main__":
    main()
