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
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader_workers.source import OpenedWindow, WindowSource
from loader_workers.token_shard import Tokens
from protos.errors import DomainEmpty, InvalidMessage
from protos.types import Lane, Places

logger = logging.getLogger(__name__)

_RESERVE_STEPS = 16
"""The next window is opened when this one would not last for so many steps, even if the mixture
went to this domain alone: so no change of the mixture finds a lane without sequences at hand."""

_FARTHEST_STEPS = 1 << 16
"""Windows that are needed later than this are equally far away."""

MAX_EMPTY_EPOCHS = 8
"""A lane's samples change from epoch to epoch, so one without tokens is passed over a few times."""

_ONE_ON = np.array([0, 0, 1], dtype=np.uint32)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Taken:
    """Consecutive sequences of one domain of a lane."""

    tokens: Tokens
    """[sequences, sequence_length + 1]"""

    num_tokens: NDArray[np.uint32]
    """[sequences]"""

    places: NDArray[np.uint32]
    """[sequences, 3]: where each stood."""

    places_after: NDArray[np.uint32]
    """[sequences, 3]: the lane's place after each."""

    document_starts: list[NDArray[np.int64]]
    """Where documents begin in each sequence, its own start aside; empty: not asked for."""


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
        self._slots_per_lane = source.spec.slots_per_lane
        self.share = 1.0
        """Of the mixture in force: how fast this place moves on."""

        self._opened: OpenedWindow | None = None
        self._ahead: tuple[int, int, Future[OpenedWindow]] | None = None
        num_windows = self._num_windows()
        if self.window and self.window >= num_windows:
            raise InvalidMessage(
                f"the cursor of lane {lane} names window {self.window} of epoch {self.epoch} of "
                f"domain {self._name}, which has {num_windows}; was it made with another index?"
            )

    def prepare(self, distance: int) -> None:
        """Have the window at this place opened on another thread; it is needed in so many steps."""
        if self._opened is None and self._ahead is None:
            self._open_ahead(self.epoch, self.window, distance)

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
        elif self._ahead is None:
            num_left = len(opened) - self.sequence
            if num_left <= _RESERVE_STEPS * self._slots_per_lane:
                self._open_next(num_left)
        return segment

    def close(self) -> None:
        """Give up what is being opened ahead."""
        if self._ahead is not None:
            self._ahead[2].cancel()
            self._ahead = None

    def _with_sequences(self) -> OpenedWindow:
        """Return the open window, after moving on to one that has a sequence left."""
        if self._opened is not None and self.sequence < len(self._opened):
            return self._opened
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
            if not ahead[2].done():
                self._source.hurry(self._domain, self._lane, self.epoch, self.window)
            self._opened = ahead[2].result()
        else:
            self._opened = self._source.open(self._domain, self._lane, self.epoch, self.window)
        return self._opened

    def _open_next(self, num_left: int) -> None:
        """Open the window after this one, which has so many sequences left."""
        per_step = max(self.share * self._slots_per_lane, 1 / _FARTHEST_STEPS)
        steps_left = min(int(num_left / per_step) + 1, _FARTHEST_STEPS)
        if self.window + 1 < self._num_windows():
            self._open_ahead(self.epoch, self.window + 1, steps_left)
        else:
            self._open_ahead(self.epoch + 1, 0, steps_left)

    def _open_ahead(self, epoch: int, window: int, distance: int) -> None:
        future = self._source.open_ahead(self._domain, self._lane, epoch, window, distance=distance)
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

    def __init__(
        self, source: WindowSource, lane: Lane, places: Places, *, documents: bool = False
    ) -> None:
        self._spec = source.spec
        self._documents = documents
        self._positions = [
            LanePosition(source, domain, lane, place)
            for domain, place in enumerate(places.tolist())
        ]
        self._places = np.array(places, dtype=np.uint32)

    def places(self) -> Places:
        """Return the lane's place in every domain."""
        return self._places.copy()

    def prepare(self, domain: int, *, share: float) -> None:
        """Have a domain's window opened ahead of need; the domain has this share from now on."""
        position = self._positions[domain]
        position.share = share
        # One with a larger share is the sooner without sequences.
        position.prepare(int(1 / max(share, 1 / _FARTHEST_STEPS)))

    def take(self, domain: int, count: int) -> Taken:
        """Deliver the next `count` sequences of a domain.

        Raises:
            DomainEmpty: the lane has no tokens in this domain.
            NotReady: the worker is stopping.
        """
        parts: list[Taken] = []
        while count:
            segment = self._reach(domain, count)
            tokens, num_tokens = segment.opened.take(segment.start, segment.end)
            places = np.empty((len(tokens), 3), dtype=np.uint32)
            places[:, 0] = segment.epoch
            places[:, 1] = segment.window
            places[:, 2] = np.arange(segment.start, segment.end)
            after = places + _ONE_ON
            after[-1] = self._places[domain]
            starts = (
                segment.opened.document_starts(segment.start, segment.end)
                if self._documents
                else []
            )
            parts.append(
                Taken(
                    tokens=tokens,
                    num_tokens=num_tokens,
                    places=places,
                    places_after=after,
                    document_starts=starts,
                )
            )
            count -= len(tokens)
        if len(parts) == 1:
            return parts[0]
        return Taken(
            tokens=np.concatenate([part.tokens for part in parts]),
            num_tokens=np.concatenate([part.num_tokens for part in parts]),
            places=np.concatenate([part.places for part in parts]),
            places_after=np.concatenate([part.places_after for part in parts]),
            document_starts=[starts for part in parts for starts in part.document_starts],
        )

    def skip(self, domain: int, count: int) -> None:
        """Move over the next `count` sequences of a domain."""
        while count:
            segment = self._reach(domain, count)
            count -= segment.end - segment.start

    def _reach(self, domain: int, limit: int) -> _Segment:
        position = self._positions[domain]
        segment = position.reach(limit)
        self._places[domain] = position.epoch, position.window, position.sequence
        return segment

    def close(self) -> None:
        """Give up what is being opened ahead; idempotent."""
        for position in self._positions:
            position.close()
