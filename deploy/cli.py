"""The command `headrace`: only what must work before anything is known to be installed."""

from __future__ import annotations

import sys

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
    app()


if __name__ == "__main__":
    main()
