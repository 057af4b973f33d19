"""Where lanes get their windows: the run's index and order over the shard cache."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from loader_workers.build_pool import NOW
from loader_workers.cache import ShardCache
from loader_workers.order import EpochOrder, NumberedShards, OrderKey
from loader_workers.token_shard import Tokens, TokenShard
from loader_workers.window import ShardsOf, Window
from loader_workers.window_memory import WindowMemory
from protos.dataset_index import DatasetIndex
from protos.errors import IndexMismatch
from protos.spec import RunSpec
from protos.types import Lane

WINDOW_BYTES = 512_000_000
"""Memory for the joined tokens of windows, by default."""

_NUMBERINGS_KEPT = 512
"""Epochs of domains whose shard order is remembered; each stream works in one or two a domain."""

_SHARDS_HELD = 1024
"""Token shards kept open for windows that are not joined; each holds a file."""

_FAR = 1 << 20
"""Distance, in steps, of shards that a window after the next one needs."""

_JOIN_AFTER = 16
"""A window is joined once it was gathered from for this part of its sequences: then that has cost
about as much as joining does."""


class OpenedWindow:
    """A window with the order in which its sequences are delivered."""

    def __init__(
        self,
        window: Window,
        delivery: NDArray[np.int64],
        *,
        memory: WindowMemory,
        shards: ShardsOf,
    ) -> None:
        self._window = window
        self._delivery = delivery
        self._memory = memory
        self._shards = shards
        self._num_gathered = 0

    def __len__(self) -> int:
        return len(self._delivery)

    def join(self) -> None:
        """Lay the window's tokens in memory, if there is room for them."""
        self._num_gathered = 0
        self._memory.join(self._window, lambda: self._window.join(self._shards()))

    def take(self, start: int, end: int) -> tuple[Tokens, NDArray[np.uint32]]:
        """Return the sequences at delivery positions [start, end), and their token counts.

        Raises:
            NotReady: a token shard is no longer what it was when the window was opened.
        """
        if self._window.is_joined:
            self._memory.used(self._window)
        else:
            self._num_gathered += end - start
            if self._num_gathered * _JOIN_AFTER > len(self):
                self.join()
        return self._window.gather(self._delivery[start:end], self._shards)

    def document_starts(self, start: int, end: int) -> list[NDArray[np.int64]]:
        """Return where documents begin in the sequences at delivery positions [start, end)."""
        return self._window.document_starts(self._delivery[start:end])


class WindowSource:
    """Opens windows, at once or ahead of need on threads of its own. Thread-safe."""

    def __init__(
        self,
        spec: RunSpec,
        index: DatasetIndex,
        cache: ShardCache,
        *,
        threads: int = 4,
        window_bytes: int = WINDOW_BYTES,
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
        self._held: OrderedDict[tuple[int, int], TokenShard] = OrderedDict()
        self._memory = WindowMemory(budget_bytes=window_bytes)
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

    def open(
        self, domain: int, lane: Lane, epoch: int, window: int, *, distance: int = NOW
    ) -> OpenedWindow:
        """Open a window; waits while its shards are tokenized.

        Args:
            domain: position in the run's domains.
            lane: whose window it is.
            epoch: of the domain.
            window: position in the lane's epoch.
            distance: in how many steps it is needed; shards that are needed sooner come first.

        Raises:
            NotReady: the worker is stopping.
        """
        spec, order = self.spec, self.order(domain, lane, epoch)
        samples = order.window(window)
        positions = np.unique(samples.shards).tolist()
        self._prefetch(domain, positions, distance)
        opened = Window(
            samples,
            self._token_shards(domain, positions, distance),
            sequence_length=spec.sequence_length,
            packing=spec.packing,
            eot_id=spec.eot_id,
            dtype=spec.token_dtype,
        )
        result = OpenedWindow(
            opened,
            order.sequence_order(window, opened.num_sequences),
            memory=self._memory,
            shards=lambda: self._token_shards(domain, positions, NOW),
        )
        result.join()
        return result

    def open_ahead(
        self, domain: int, lane: Lane, epoch: int, window: int, *, distance: int
    ) -> Future[OpenedWindow] | None:
        """Open a window on another thread, and have the shards of the one after it built.

        None: the lane has no such window, or the worker is stopping.
        """
        order = self.order(domain, lane, epoch)
        if window >= order.num_windows:
            return None
        try:
            future = self._ahead.submit(self._open_ahead, domain, lane, epoch, window, distance)
        except RuntimeError:
            # The pool was shut down: the worker is stopping.
            return None
        return future

    def hurry(self, domain: int, lane: Lane, epoch: int, window: int) -> None:
        """Have the shards of a window built now, if they are not there yet."""
        samples = self.order(domain, lane, epoch).window(window)
        self._prefetch(domain, np.unique(samples.shards).tolist(), NOW)

    def _open_ahead(
        self, domain: int, lane: Lane, epoch: int, window: int, distance: int
    ) -> OpenedWindow:
        opened = self.open(domain, lane, epoch, window, distance=distance)
        order = self.order(domain, lane, epoch)
        if window + 1 < order.num_windows:
            positions = np.unique(order.window(window + 1).shards).tolist()
            self._prefetch(domain, positions, _FAR)
        return opened

    def _prefetch(self, domain: int, positions: list[int], distance: int) -> None:
        shards = self._shards[domain]
        self._cache.prefetch((shards[position] for position in positions), distance=distance)

    def _token_shards(
        self, domain: int, positions: list[int], distance: int
    ) -> dict[int, TokenShard]:
        refs = self._shards[domain]
        found = {position: self._cache.get(refs[position], distance) for position in positions}
        with self._lock:
            for position, shard in found.items():
                self._held[domain, position] = shard
                self._held.move_to_end((domain, position))
            while len(self._held) > _SHARDS_HELD:
                self._held.popitem(last=False)
        return found

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
