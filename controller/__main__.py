"""`python -m controller run.yaml`: a controller in the foreground, until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from controller.app import run_controller
from controller.config import RunConfig, load_run_file, with_metrics
from controller.tracing import tracing
from protos.errors import (
    AlreadyServing,
    ConfigError,
    DataError,
    HeadraceError,
    LedgerError,
    UnknownDomain,
)
from protos.failpoints import arm
from protos.log_format import FORMATS, configure_logging, log_failure

EXIT_CODES: dict[type[HeadraceError], int] = {
    ConfigError: 2,
    UnknownDomain: 2,
    AlreadyServing: 3,
    DataError: 4,
    LedgerError: 5,
}
"""What the process ends with; 0: it was told to stop, 1: anything else."""


def main(arguments: list[str] | None = None) -> int:
    """Serve the run that the run file describes; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m controller", description=__doc__)
    parser.add_argument("run_file", type=Path, help="the run file (YAML)")
    parser.add_argument(
        "--standby",
        action="store_true",
        help="wait while another controller has the ledger, and take over once that is dead",
    )
    parser.add_argument("--verbose", action="store_true", help="log what happens, on stderr")
    parser.add_argument(
        "--metrics", metavar="HOST:PORT", help="serve figures for Prometheus there, at /metrics"
    )
    parser.add_argument("--log-format", choices=FORMATS, help="default: HEADRACE_LOG_FORMAT, text")
    options = parser.parse_args(arguments)
    try:
        level = logging.INFO if options.verbose else logging.WARNING
        configure_logging(options.log_format, level=level)
        config = with_metrics(load_run_file(options.run_file), options.metrics)
        asyncio.run(serve(config, standby=options.standby))
    except HeadraceError as error:
        if not log_failure("headrace controller", error):
            print(f"headrace controller: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


async def serve(config: RunConfig, *, standby: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; say on stdout where. See `run_controller`."""
    arm(os.environ)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with tracing(os.environ):
        await run_controller(
            config, on_ready=_say_ready, on_page=_say_page, stop=stop, standby=standby
        )


def exit_code(error: HeadraceError) -> int:
    """Return what a process ends with because of `error`."""
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return code
    return 1


def _say_page(url: str) -> None:
    print(f"headrace page at {url}", flush=True)


def _say_ready(address: str) -> None:
    print(f"headrace controller ready at {address}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
