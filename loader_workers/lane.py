"""A lane: one place in every domain, moved forward sequence by sequence.

A place is (epoch, window, sequence). Its one canonical form is a function of the last sequence
delivered: after a window's last sequence it is the start of the window after it, and after an
epoch's last window the start of the next epoch. So `sequence` stands below the window's number of
sequences, or is 0 in a window that has not been opened yet: writing a cursor down never needs the
next window's tokens. A window that turns out to have no sequences is passed over when the next
sequence is taken, not before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader_workers.source import OpenedWindow, WindowSource
from loader_workers.window import Tokens
from protos.errors import DomainEmpty, InvalidMessage
from protos.types import Lane, Places

logger = logging.getLogger(__name__)

MAX_EMPTY_EPOCHS = 8
"""A lane's samples change from epoch to epoch, so one without tokens is passed over a few times."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Taken:
    """Consecutive sequences of one domain of a lane."""

    tokens: Tokens
    """[sequences, sequence_length + 1]"""

    num_tokens: NDArray[np.uint32]
    """[sequences]"""

    places: NDArray[np.uint32]
    """[sequences, 3]: where each stood."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Segment:
    """A run of sequences of one window."""

    opened: OpenedWindow
    epoch: int
    window: int
    start: int
    end: int


class LanePosition:
    """A lane's place in one domain, with the window that is open there and the next one."""

    def __init__(self, source: WindowSource, domain: int, lane: Lane, place: list[int]) -> None:
        self._source = source
        self._domain = domain
        self._lane = lane
        self.epoch, self.window, self.sequence = place
        self._opened: OpenedWindow | None = None
        self._ahead: tuple[int, int, Future[OpenedWindow]] | None = None
        num_windows = self._num_windows()
        if self.window and self.window >= num_windows:
            raise InvalidMessage(
                f"the cursor of lane {lane} names window {self.window} of epoch {self.epoch} of "
                f"domain {self._name}, which has {num_windows}; was it made with another index?"
            )

    def prepare(self) -> None:
        """Have the window at this place opened on another thread."""
        if self._opened is None and self._ahead is None:
            self._open_ahead(self.epoch, self.window)

    def reach(self, limit: int) -> _Segment:
        """Move over up to `limit` sequences of one window, and say which.

        Raises:
            DomainEmpty: the lane has no tokens in this domain, epoch after epoch.
            NotReady: the worker is stopping.
        """
        opened = self._with_sequences()
        segment = _Segment(
            opened=opened,
            epoch=self.epoch,
            window=self.window,
            start=self.sequence,
            end=min(self.sequence + limit, len(opened)),
        )
        self.sequence = segment.end
        if self.sequence == len(opened):
            self._next_window()
        return segment

    def close(self) -> None:
        """Give up what is being opened ahead."""
        if self._ahead is not None:
            self._ahead[2].cancel()
            self._ahead = None

    def _with_sequences(self) -> OpenedWindow:
        """Return the open window, after moving on to one that has a sequence left."""
        first_epoch = self.epoch
        while self.epoch - first_epoch <= MAX_EMPTY_EPOCHS:
            if self.window < self._num_windows():
                opened = self._open()
                if self.sequence < len(opened):
                    return opened
                if self.sequence > len(opened):
                    logger.warning(
                        "lane %d of domain %s: cursor at sequence %d of window %d of epoch %d, "
                        "which has %d now; going on with the next window",
                        *(self._lane, self._name, self.sequence, self.window, self.epoch),
                        len(opened),
                    )
            self._next_window()
        raise DomainEmpty(
            f"lane {self._lane} found no tokens in domain {self._name} in {MAX_EMPTY_EPOCHS} "
            f"epochs; give the domain more samples than the run has lanes, or its share to others"
        )

    def _open(self) -> OpenedWindow:
        if self._opened is not None:
            return self._opened
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (self.epoch, self.window) and not ahead[2].cancel():
            self._opened = ahead[2].result()
        else:
            self._opened = self._source.open(self._domain, self._lane, self.epoch, self.window)
        if self.window + 1 < self._num_windows():
            self._open_ahead(self.epoch, self.window + 1)
        else:
            self._open_ahead(self.epoch + 1, 0)
        return self._opened

    def _open_ahead(self, epoch: int, window: int) -> None:
        future = self._source.open_ahead(self._domain, self._lane, epoch, window)
        self._ahead = None if future is None else (epoch, window, future)

    def _next_window(self) -> None:
        self._opened = None
        self.window, self.sequence = self.window + 1, 0
        if self.window >= self._num_windows():
            self.epoch, self.window = self.epoch + 1, 0

    def _num_windows(self) -> int:
        return self._source.order(self._domain, self._lane, self.epoch).num_windows

    @property
    def _name(self) -> str:
        return self._source.spec.domains[self._domain]


class LaneReader:
    """Delivers a lane's sequences, domain by domain. Not thread-safe."""

    def __init__(self, source: WindowSource, lane: Lane, places: Places) -> None:
        self._spec = source.spec
        self._positions = [
            LanePosition(source, domain, lane, place)
            for domain, place in enumerate(places.tolist())
        ]

    def places(self) -> Places:
        """Return the lane's place in every domain."""
        return np.array(
            [[at.epoch, at.window, at.sequence] for at in self._positions], dtype=np.uint32
        )

    def prepare(self, domains: Iterable[int]) -> None:
        """Have the windows of these domains opened ahead of need, in this order."""
        for domain in domains:
            self._positions[domain].prepare()

    def take(self, domain: int, count: int) -> Taken:
        """Deliver the next `count` sequences of a domain.

        Raises:
            DomainEmpty: the lane has no tokens in this domain.
            NotReady: the worker is stopping.
        """
        position = self._positions[domain]
        shape = (count, self._spec.sequence_length + 1)
        taken = Taken(
            tokens=np.empty(shape, dtype=self._spec.token_dtype),
            num_tokens=np.empty(count, dtype=np.uint32),
            places=np.empty((count, 3), dtype=np.uint32),
        )
        done = 0
        while done < count:
            segment = position.reach(count - done)
            rows = slice(done, done + segment.end - segment.start)
            taken.tokens[rows], taken.num_tokens[rows] = segment.opened.take(
                segment.start, segment.end
            )
            taken.places[rows, 0] = segment.epoch
            taken.places[rows, 1] = segment.window
            taken.places[rows, 2] = np.arange(segment.start, segment.end)
            done = rows.stop
        return taken

    def skip(self, domain: int, count: int) -> None:
        """Move over the next `count` sequences of a domain."""
        while count:
            segment = self._positions[domain].reach(count)
            count -= segment.end - segment.start

    def close(self) -> None:
        """Give up what is being opened ahead; idempotent."""
        for position in self._positions:
            position.close()
