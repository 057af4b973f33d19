"""Would a program take these arguments? Asked of its own parser; nothing is started."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import typer
import typer.main
from ray.scripts.scripts import cli as ray_cli
from torch.distributed.run import get_args_parser

from deploy.commands import app
from loader_workers.__main__ import make_parser

ROOT = Path(__file__).resolve().parents[1]
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_PLAIN = {"curl", "openssl", "pip", "cd", "cp", "umask"}
"""Programs of others that have no parser here; their arguments are taken on trust."""


class Refused(Exception):
    """What a program would say."""


def check_command(line: str) -> None:
    """Check a line of a shell.

    Raises:
        Refused: a program would not take it, or is not known.
    """
    for part in re.split(r"\s*(?:&&|;|\||&$)\s*", line.strip("()")):
        words = shlex.split(part, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            words.pop(0)
        if words:
            _check(words)


def _check(words: list[str]) -> None:
    name = Path(words[0]).name
    if name in _PLAIN:
        return
    if name not in _CHECKS:
        raise Refused(f"{words[0]!r} is no program that a test knows: {' '.join(words)}")
    _CHECKS[name](words[1:])


_ERRORS: tuple[type[Exception], ...] = tuple(
    kind
    for kind in (*click.BadParameter.__mro__, *typer.BadParameter.__mro__)
    if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)
"""Newer typers bring a click of their own."""


def _click(command: Any, words: list[str]) -> None:
    if hasattr(command, "commands") and words and not words[0].startswith("-"):
        chosen = command.commands.get(words[0])
        if chosen is None:
            raise Refused(f"there is no command {words[0]}")
        _click(chosen, words[1:])
        return
    try:
        command.make_context(command.name or "", list(words))
    except (click.exceptions.Exit, typer.Exit):
        return
    except _ERRORS as error:
        raise Refused(str(error)) from None


def _headrace(words: list[str]) -> None:
    _click(typer.main.get_command(app), words)


def _ray(words: list[str]) -> None:
    own, dashes, entrypoint = _parted(words, "--")
    _click(ray_cli, [*own, *(["--", "true"] if dashes else [])])
    if dashes:
        _check(entrypoint)


def _parted(words: list[str], at: str) -> tuple[list[str], bool, list[str]]:
    if at not in words:
        return words, False, []
    index = words.index(at)
    return words[:index], True, words[index + 1 :]


def _argparse(parser: argparse.ArgumentParser, words: list[str]) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(words)
    except SystemExit:
        raise Refused(said.getvalue().strip()) from None


def _torchrun(words: list[str]) -> None:
    _argparse(get_args_parser(), words)


def _python(words: list[str]) -> None:
    if words[:1] != ["-m"]:
        raise Refused(f"python {' '.join(words)}: only `python -m` is known")
    module, rest = words[1], words[2:]
    if importlib.util.find_spec(module) is None:
        raise Refused(f"there is no module {module}")
    if module == "loader_workers":
        _argparse(make_parser(), rest)


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if "=" not in word and word not in targets:
            raise Refused(f"the Makefile has no target {word}")


_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "headrace": _headrace,
    "ray": _ray,
    "torchrun": _torchrun,
    "python": _python,
    "make": _make,
}
