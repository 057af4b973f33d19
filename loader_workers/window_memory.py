"""A budget of bytes for windows whose joined tokens lie in memory."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from loader_workers.window import Window


class WindowMemory:
    """Lets windows join, and parts those used longest ago when the budget is spent. Thread-safe.

    A window that is parted, or never got room, is gathered from its token shards: slower, with the
    same sequences.
    """

    def __init__(self, *, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        # Entered again by the end of a window whose last reference goes while it is held.
        self._lock = threading.RLock()
        self._windows: OrderedDict[int, tuple[weakref.ref[Window], int]] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """How much the joined windows hold."""
        return self._num_bytes

    def join(self, window: Window, join: Callable[[], None]) -> bool:
        """Have a window joined by `join` if it fits the budget at all; tell whether it was."""
        size = window.joined_bytes
        if size > self._budget_bytes:
            return False
        key = id(window)
        with self._lock:
            if key in self._windows:
                return True
            while self._num_bytes + size > self._budget_bytes:
                self._part_oldest()
            self._windows[key] = (weakref.ref(window), size)
            self._num_bytes += size
        weakref.finalize(window, partial(self._forget, key)).atexit = False
        join()
        with self._lock:
            if key not in self._windows:
                # Others needed the room while it was being filled.
                window.part()
        return True

    def used(self, window: Window) -> None:
        """Say that a window was taken from just now."""
        with self._lock:
            if id(window) in self._windows:
                self._windows.move_to_end(id(window))

    def _part_oldest(self) -> None:
        key = next(iter(self._windows))
        window = self._windows[key][0]()
        self._forget(key)
        if window is not None:
            window.part()

    def _forget(self, key: int) -> None:
        with self._lock:
            _, size = self._windows.pop(key, (None, 0))
            self._num_bytes -= size
