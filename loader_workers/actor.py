"""A loader worker as a Ray actor. Ray places, watches and ends it; no data goes through Ray."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

import ray
from ray.util.metrics import Counter, Gauge

from loader_workers.figures import FIGURES, TAGS, Telling
from loader_workers.worker import Worker, WorkerSettings, WorkerStats
from protos.log_format import configure_logging


class RayRecorder:
    """Ray's counters and gauges, which a cluster's metrics endpoints show."""

    def __init__(self, tags: dict[str, str]) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        for figure in FIGURES:
            if figure.kind == "counter":
                counter = Counter(figure.name, description=figure.what, tag_keys=TAGS)
                counter.set_default_tags(tags)
                self._counters[figure.name] = counter
            else:
                gauge = Gauge(figure.name, description=figure.what, tag_keys=TAGS)
                gauge.set_default_tags(tags)
                self._gauges[figure.name] = gauge

    def add(self, name: str, value: float) -> None:
        """Have a counter grow."""
        self._counters[name].inc(value)

    def set(self, name: str, value: float) -> None:
        """Have a gauge stand at a value."""
        self._gauges[name].set(value)


class LoaderHost:
    """One loader worker in a process of Ray's."""

    def __init__(self, settings: WorkerSettings) -> None:
        # One thread a shard: `settings.threads` alone says how many cores tokenizing may take.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        configure_logging()
        self._stop = threading.Event()
        self._worker = Worker(settings, stop=self._stop)
        self._stack = ExitStack()
        self._is_serving = False

    def start(self, timeout_s: float = 60.0) -> str:
        """Serve; return the endpoint once the controller has said what the run is.

        Twice does no harm.

        Raises:
            NotReady: the controller did not answer in time.
            HeadraceError: what the worker cannot work with.
        """
        if not self._is_serving:
            with ExitStack() as stack:
                stack.enter_context(self._worker)
                self._worker.wait_ready(timeout_s=timeout_s)
                self._stack = stack.pop_all()
            self._is_serving = True
            tags = {"run": self._worker.run_id, "worker": self._worker.worker_id}
            Telling(self._worker.stats, RayRecorder(tags), stop=self._stop).start()
        return self._worker.endpoint

    def stats(self) -> WorkerStats:
        """Return how the worker stands."""
        return self._worker.stats()

    def leave(self) -> None:
        """Have the lanes handed to other workers; `stats` says when that has happened."""
        self._worker.leave()

    def stop(self) -> None:
        """Stop serving; idempotent."""
        self._stop.set()
        self._stack.close()


LoaderActor = ray.remote(LoaderHost)
"""`LoaderActor.options(...).remote(settings)`; then `start`, `stats`, `leave`, `stop`."""
