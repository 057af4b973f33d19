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
from loader_workers.worker import DRAIN_S, WorkerSettings, run_worker
from protos.errors import HeadraceError
from protos.failpoints import arm
from protos.log_format import FORMATS, configure_logging, log_failure
from protos.security import Security

_EXIT_FAILED = 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
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
    parser.add_argument(
        "--drain-s",
        type=float,
        default=DRAIN_S,
        metavar="SECONDS",
        help="how long to serve on after Ctrl-C or SIGTERM until other workers have taken the "
        "lanes (%(default)g); a second signal ends at once",
    )
    _add_security(parser)
    parser.add_argument("--verbose", action="store_true", help="log what happens, on stderr")
    parser.add_argument("--log-format", choices=FORMATS, help="default: HEADRACE_LOG_FORMAT, text")
    return parser


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit status.

    The first signal has the lanes handed to other workers, a second one ends at once.
    """
    arguments = make_parser().parse_args()
    # One thread a shard: `--threads` alone says how many cores tokenizing may take.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop, hurry = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        level = logging.INFO if arguments.verbose else logging.WARNING
        configure_logging(arguments.log_format, level=level)
        arm(os.environ)
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
            security=_security(arguments),
        )
        run_worker(
            settings,
            stop=stop,
            hurry=hurry,
            drain_s=arguments.drain_s,
            on_ready=lambda endpoint: print(endpoint, flush=True),
        )
    except HeadraceError as error:
        if not log_failure("loader worker", error):
            print(f"loader worker: {error}", file=sys.stderr)
        return _EXIT_FAILED
    return 0


_FILES = {
    "token_file": "holds the run's join token",
    "ca": "authorities of the controller's certificate (PEM)",
    "cert": "this worker's certificate (PEM)",
    "key": "its key (PEM)",
    "client_ca": "authorities that must vouch for ranks: mutual TLS",
}


def _add_security(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "security", "Files; they are read again when they change. HEADRACE_ variables stand in."
    )
    for name, what in _FILES.items():
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=Path, metavar="FILE", help=what)
    group.add_argument("--server-name", default="", help="in the controller's certificate")
    group.add_argument("--insecure", action="store_true", help="serve other hosts without TLS")


def _security(arguments: argparse.Namespace) -> Security:
    found = Security.from_environment(os.environ)
    return Security(
        ca=arguments.ca or found.ca,
        cert=arguments.cert or found.cert,
        key=arguments.key or found.key,
        client_ca=arguments.client_ca,
        server_name=arguments.server_name or found.server_name,
        join_token_file=arguments.token_file or found.join_token_file,
        insecure=arguments.insecure,
    )


if __name__ == "__main__":
    sys.exit(main())
