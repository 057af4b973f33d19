"""Errors as exit codes: one sentence on stderr, never a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console

from deploy.exit_codes import STOPPED
from deploy.failures import Stopped, TrainerFailed
from protos.errors import (
    AlreadyServing,
    ConfigError,
    DataError,
    HeadraceError,
    LedgerError,
    Rejected,
)
from protos.log_format import log_failure

P = ParamSpec("P")
R = TypeVar("R")

EXIT_CODES: dict[type[HeadraceError], int] = {
    HeadraceError: 1,  # whatever is not below, such as a controller that does not answer
    ConfigError: 2,
    Rejected: 2,
    AlreadyServing: 3,
    DataError: 4,
    LedgerError: 5,
    TrainerFailed: 6,
    Stopped: STOPPED,
}

stderr = Console(stderr=True)


def exit_code(error: HeadraceError) -> int:
    """Return the code of the nearest class that has one."""
    return next(EXIT_CODES[base] for base in type(error).__mro__ if base in EXIT_CODES)


def told(command: Callable[P, R]) -> Callable[P, R]:
    """Have a command end with a sentence and an exit code where it raises one of our errors."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except HeadraceError as error:
            if not log_failure("headrace", error):
                stderr.print(f"headrace: {error}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            stderr.print("headrace: stopped")
            raise typer.Exit(STOPPED) from None

    return wrapped
