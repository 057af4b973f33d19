"""Where lanes get their windows: the run's index and order over the shard cache."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from loader_workers.cache import ShardCache
from loader_workers.order import EpochOrder, NumberedShards, OrderKey
from loader_workers.window import Tokens, Window
from protos.dataset_index import DatasetIndex
from protos.errors import IndexMismatch
from protos.spec import RunSpec
from protos.types import Lane

_NUMBERINGS_KEPT = 512
"""Epochs of domains whose shard order is remembered; each stream works in one or two a domain."""

_FAR = 2
"""Distance of shards that a window after the next one needs."""


class OpenedWindow:
    """A window with the order in which its sequences are delivered."""

    def __init__(self, window: Window, delivery: NDArray[np.int64]) -> None:
        self._window = window
        self._delivery = delivery

    def __len__(self) -> int:
        return len(self._delivery)

    def take(self, start: int, end: int) -> tuple[Tokens, NDArray[np.uint32]]:
        """Return the sequences at delivery positions [start, end), and their token counts."""
        return self._window.gather(self._delivery[start:end])


class WindowSource:
    """Opens windows, at once or ahead of need on threads of its own. Thread-safe."""

    def __init__(
        self, spec: RunSpec, index: DatasetIndex, cache: ShardCache, *, threads: int = 4
    ) -> None:
        if index.domains != spec.domains:
            raise IndexMismatch(
                f"the dataset index has the domains {', '.join(index.domains)}, the run has "
                f"{', '.join(spec.domains)}; build the index again with `headrace index`"
            )
        self.spec = spec
        self._cache = cache
        self._shards = [index.shards(domain) for domain in spec.domains]
        self._samples = [
            np.array([shard.num_samples for shard in shards], dtype=np.int64)
            for shards in self._shards
        ]
        self._numberings: OrderedDict[tuple[int, int], NumberedShards] = OrderedDict()
        self._lock = Lock()
        self._ahead = ThreadPoolExecutor(threads, thread_name_prefix="window-opener")

    def order(self, domain: int, lane: Lane, epoch: int) -> EpochOrder:
        """Return the order of a lane in an epoch of a domain."""
        spec = self.spec
        key = OrderKey(
            seed=spec.seed,
            domain=spec.domains[domain],
            lane=lane,
            lanes=spec.lanes,
            window_samples=spec.window_samples,
            interleave=spec.interleave,
        )
        return EpochOrder(key, epoch=epoch, numbered=self._numbered(domain, epoch))

    def open(self, domain: int, lane: Lane, epoch: int, window: int) -> OpenedWindow:
        """Open a window; waits while its shards are tokenized.

        Raises:
            NotReady: the worker is stopping.
        """
        spec, order = self.spec, self.order(domain, lane, epoch)
        samples = order.window(window)
        positions = np.unique(samples.shards).tolist()
        refs = self._shards[domain]
        self._cache.prefetch((refs[position] for position in positions), distance=0)
        opened = Window(
            samples,
            {position: self._cache.get(refs[position]) for position in positions},
            sequence_length=spec.sequence_length,
            eot_id=spec.eot_id,
            dtype=spec.token_dtype,
        )
        return OpenedWindow(opened, order.sequence_order(window, opened.num_sequences))

    def open_ahead(
        self, domain: int, lane: Lane, epoch: int, window: int
    ) -> Future[OpenedWindow] | None:
        """Open a window on another thread, and have the shards of the one after it built.

        None: the lane has no such window, or the worker is stopping.
        """
        order = self.order(domain, lane, epoch)
        if window >= order.num_windows:
            return None
        try:
            future = self._ahead.submit(self._open_ahead, domain, lane, epoch, window)
        except RuntimeError:
            # The pool was shut down: the worker is stopping.
            return None
        return future

    def _open_ahead(self, domain: int, lane: Lane, epoch: int, window: int) -> OpenedWindow:
        opened = self.open(domain, lane, epoch, window)
        order = self.order(domain, lane, epoch)
        if window + 1 < order.num_windows:
            positions = np.unique(order.window(window + 1).shards).tolist()
            shards = self._shards[domain]
            self._cache.prefetch((shards[position] for position in positions), distance=_FAR)
        return opened

    def _numbered(self, domain: int, epoch: int) -> NumberedShards:
        with self._lock:
            known = self._numberings.get((domain, epoch))
            if known is None:
                known = NumberedShards(
                    self.spec.seed,
                    self.spec.domains[domain],
                    epoch,
                    shard_samples=self._samples[domain],
                )
                self._numberings[domain, epoch] = known
            self._numberings.move_to_end((domain, epoch))
            if len(self._numberings) > _NUMBERINGS_KEPT:
                self._numberings.popitem(last=False)
            return known

    def close(self) -> None:
        """Open nothing more ahead; idempotent."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> WindowSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
