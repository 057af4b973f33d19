"""The command `headrace`: only what must work before anything is known to be installed."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import NoReturn

from deploy.exit_codes import STOPPED

PAGE_ADDRESS = "127.0.0.1:7780"
"""Where the live page is served if nobody says where; so that it need not be imported."""

_OWN = ("controller", "deploy", "loader_workers", "protos", "trainer_client")


def main() -> NoReturn:
    """Run the command line; end the process with its exit status."""
    try:
        _run()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        # Commands say so themselves; this one came while they were still imported.
        print("headrace: stopped", file=sys.stderr)
        status = STOPPED
    leave(status)


def leave(status: int) -> NoReturn:
    """End the process now: Python would first take apart, for seconds, what the kernel frees."""
    with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _run() -> None:
    try:
        if sys.argv[1:] in ([], ["--help"]):
            # Without the commands themselves, whose imports take longer than reading the help.
            from deploy.overview import app
        else:
            from deploy.commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _OWN:
            raise
        print(
            f"headrace: the package {missing!r} is missing; the command needs more than a trainer "
            "does: pip install 'headrace[server]' (and headrace[local] for `headrace run`)",
            file=sys.stderr,
        )
        sys.exit(2)
    app(with_page_address(sys.argv[1:]))


def with_page_address(arguments: list[str]) -> list[str]:
    """Give `--dashboard` its default address where none follows it.

    The parser knows options with a value and options without, and none that are both.
    """
    if "--dashboard" not in arguments:
        return arguments
    place = arguments.index("--dashboard") + 1
    if re.fullmatch(r"\S+:\d+", "".join(arguments[place : place + 1])):
        return arguments
    return [*arguments[:place], PAGE_ADDRESS, *arguments[place:]]


if __name__ == "__main__":
    main()
