"""The command `headrace`: only what must work before anything is known to be installed."""

from __future__ import annotations

import re
import sys

PAGE_ADDRESS = "127.0.0.1:7780"
"""Where the live page is served if nobody says where; so that it need not be imported."""

_OWN = ("controller", "deploy", "loader_workers", "protos", "trainer_client")


def main() -> None:
    """Run the command line; end the process with its exit status."""
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
