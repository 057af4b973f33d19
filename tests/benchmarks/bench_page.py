"""CPU time that a watched page takes of its controller: watched and unwatched spells in turns.

The run has 200 domains and thousands of steps behind it (`--steps`; curves have 512 points however
many), measures gradients now and then, and goes on at two steps a second. The watcher asks for what
the page's own scripts ask for, in each spell from the page's first byte on: 60 s in all.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.fakes_controller import join_request, make_report, resume_at
from tests.fakes_driver import Worker
from tests.fakes_page import many_domains, page_run, served, write_course

DOMAINS = 200
STEP_S = 0.5
HEAT_S = 4.0
READ_S = 60.0
REPORT = Path("build/bench/page.json")


class Watcher:
    """One browser's worth of questions."""

    def __init__(self, page: str) -> None:
        self._place = urlsplit(page).netloc
        self._stop = threading.Event()
        self.num_bytes = 0
        self.first_s = 0.0

    def watch(self) -> None:
        """Load the page, then hear its events until `stop`."""
        began_s = time.monotonic()
        self._get("/", "/assets/vendor/uPlot.iife.min.js", "/assets/page.css", "/assets/app.js")
        self._get("/api/run", f"/api/series?domains={','.join(map(str, range(9)))}", "/api/steps/9")
        self.first_s = time.monotonic() - began_s
        heat_at_s = 0.0
        with closing(http.client.HTTPConnection(self._place, timeout=20)) as call:
            call.request("GET", "/api/events")
            stream = call.getresponse()
            while not self._stop.is_set():
                line = stream.readline()
                self.num_bytes += len(line)
                if time.monotonic() - heat_at_s > HEAT_S:
                    self._get("/api/alignment")
                    heat_at_s = time.monotonic()

    def _get(self, *paths: str) -> None:
        with closing(http.client.HTTPConnection(self._place, timeout=20)) as call:
            for path in paths:
                call.request("GET", path)
                answer = call.getresponse()
                self.num_bytes += len(answer.read())
                if answer.status != 200:
                    raise RuntimeError(f"{path} was answered with {answer.status}")

    def stop(self) -> None:
        """Go away."""
        self._stop.set()


@contextmanager
def _training(address: str, first_step: int) -> Iterator[None]:
    """Have a rank report steps for as long as the block lasts."""
    worker, over = Worker(address), threading.Event()
    resume = resume_at(first_step, worker.spec)
    generation = worker.client.join(join_request(0, 1, resume=resume)).generation

    def report() -> None:
        step = first_step
        while not over.wait(STEP_S):
            worker.client.report(make_report(worker.spec, generation=generation, step=step))
            step += 1

    reporting = threading.Thread(target=report)
    reporting.start()
    try:
        yield
    finally:
        over.set()
        reporting.join()
        worker.close()


def _spell(pid: int, page: str, seconds: float, *, watched: bool) -> dict[str, Any]:
    """Return the share of a core that the controller took in a spell."""
    watcher = Watcher(page)
    thread = threading.Thread(target=watcher.watch)
    process = psutil.Process(pid)
    before, began_s = process.cpu_times(), time.monotonic()
    if watched:
        thread.start()
    time.sleep(seconds)
    after, took_s = process.cpu_times(), time.monotonic() - began_s
    watcher.stop()
    if watched:
        thread.join()
    used_s = after.user + after.system - before.user - before.system
    return {
        "watched": watched,
        "share": used_s / took_s,
        "load_s": watcher.first_s,
        "bytes": watcher.num_bytes,
    }


def _until_read(page: str, num_steps: int) -> None:
    """Wait until the page has read the ledger's past, which is no part of what watching costs."""
    deadline_s = time.monotonic() + READ_S
    with closing(http.client.HTTPConnection(urlsplit(page).netloc, timeout=20)) as call:
        while time.monotonic() < deadline_s:
            call.request("GET", "/api/series?domains=0")
            curves = json.loads(call.getresponse().read())
            if curves["length"] * curves["width"] >= num_steps:
                return
            time.sleep(0.2)
    raise RuntimeError(f"the page has not read {num_steps} steps in {READ_S:g} s")


def measure(num_steps: int, seconds: float, turns: int) -> dict[str, Any]:
    """Return the spells, and what watching adds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = page_run(folder, many_domains(DOMAINS), steps=num_steps + 10_000)
        write_course(config, num_steps, align_every=max(20, num_steps // 500))
        with served(folder / "run.yaml") as site, _training(site.address, num_steps):
            _until_read(site.page, num_steps)
            spells = [
                _spell(site.process.pid, site.page, seconds, watched=watched)
                for _ in range(turns)
                for watched in (False, True)
            ]
    pairs = zip(spells[::2], spells[1::2], strict=True)
    added = [watched["share"] - alone["share"] for alone, watched in pairs]
    return {
        "steps": num_steps,
        "domains": DOMAINS,
        "seconds": seconds,
        "spells": spells,
        "core_share_added": added,
        "core_share_added_mean": sum(added) / turns,
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    found = measure(options.steps, options.seconds, options.turns)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(found, indent=2) + "\n")
    for spell in found["spells"]:
        kind = "watched" if spell["watched"] else "alone"
        print(f"{kind:8} {spell['share']:.2%} of a core, {spell['bytes']:,} bytes sent")
    each = ", ".join(f"{share:.2%}" for share in sorted(found["core_share_added"]))
    mean, watched_s = found["core_share_added_mean"], options.turns * options.seconds
    print(f"{watched_s:g} s of watching add {mean:.2%} of a core in the mean (pairs: {each})")


if __name__ == "__main__":
    main()
