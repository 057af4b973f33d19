"""Starts one loader worker in the foreground: `python -m loader_workers --controller HOST:PORT`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from loader_workers.source import WINDOW_BYTES
from loader_workers.worker import WorkerSettings, run_worker
from protos.errors import HeadraceError
from protos.security import Security

_EXIT_FAILED = 1


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loader_workers", description=__doc__)
    parser.add_argument("--controller", required=True, metavar="HOST:PORT")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for token shards")
    parser.add_argument("--cache-bytes", type=int, default=10_000_000_000, metavar="N")
    parser.add_argument("--window-bytes", type=int, default=WINDOW_BYTES, metavar="N")
    parser.add_argument("--threads", type=int, default=1, help="shards tokenized at once")
    parser.add_argument("--address", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--advertise", default="", metavar="HOST", help="name that ranks use")
    parser.add_argument("--worker-id", default="")
    parser.add_argument("--run", default="", help="refuse any other run than this one")
    parser.add_argument("--insecure", action="store_true", help="serve other hosts without TLS")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level="INFO")
    # One thread a shard: `--threads` alone says how many cores tokenizing may take.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = WorkerSettings(
            controller=arguments.controller,
            cache_dir=arguments.cache,
            cache_bytes=arguments.cache_bytes,
            window_bytes=arguments.window_bytes,
            threads=arguments.threads,
            address=arguments.address,
            advertise=arguments.advertise,
            worker_id=arguments.worker_id,
            run_id=arguments.run,
            security=Security(insecure=arguments.insecure),
        )
        run_worker(settings, stop=stop, on_ready=lambda endpoint: print(endpoint, flush=True))
    except HeadraceError as error:
        print(f"loader worker: {error}", file=sys.stderr)
        return _EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
