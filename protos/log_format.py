"""Log lines as JSON, with the coordinates run, rank, step and worker as fields of their own.

Our own processes choose by `--log-format` or HEADRACE_LOG_FORMAT; a trainer, whose logging is its
own affair, gives a handler of its choice the formatter: `handler.setFormatter(JsonFormatter())`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from typing import Any

from protos.errors import ConfigError

VARIABLE = "HEADRACE_LOG_FORMAT"
FORMATS = ("text", "json")

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_PLACEHOLDER = re.compile(
    r"(?:\b(run|rank|step|worker|generation|domain|lane|shard|shadow)[= ])?"
    r"%[-#0 +]*\d*(?:\.\d+)?([a-zA-Z%])"
)
"""A conversion of a log call's format, and the word before it where that names a coordinate."""

_coordinates: dict[str, str | int] = {}


def set_coordinates(**coordinates: str | int) -> None:
    """Have every later JSON line of this process say where it comes from: run, rank, worker."""
    _coordinates.update(coordinates)


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record: time, level, logger, message, and its coordinates.

    Coordinates come from the words before the values in a call's own format, as in
    `"report lost rank=%d step=%d: %s"`; what a value holds is never taken for one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line."""
        seconds, fraction = divmod(record.created, 1)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        line: dict[str, Any] = {
            "time": f"{when}.{int(fraction * 1000):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_coordinates,
            **_named_in(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _named_in(record: logging.LogRecord) -> dict[str, Any]:
    if not isinstance(record.args, tuple) or not isinstance(record.msg, str):
        return {}
    found = [match.groups() for match in _PLACEHOLDER.finditer(record.msg)]
    names = [name for name, kind in found if kind != "%"]
    return {
        name: value if isinstance(value, int) else str(value)
        for name, value in zip(names, record.args, strict=False)
        if name is not None
    }


def configure_logging(
    form: str | None = None, *, level: int = logging.WARNING, anew: bool = False
) -> None:
    """Set up the log of a process of ours, on stderr.

    Args:
        form: one of `FORMATS`. None: what HEADRACE_LOG_FORMAT says, or text.
        level: the least that is logged.
        anew: also where somebody else has set up the log before.

    Raises:
        ConfigError: there is no such format.
    """
    chosen = form or os.environ.get(VARIABLE) or "text"
    if chosen not in FORMATS:
        raise ConfigError(
            f"the log format is {' or '.join(FORMATS)} (--log-format, {VARIABLE}), got {chosen!r}"
        )
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if chosen == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level, handlers=[handler], force=anew)


def log_failure(program: str, error: Exception) -> bool:
    """Log what a process ends with, if its log is JSON; return whether it is."""
    is_json = any(isinstance(each.formatter, JsonFormatter) for each in logging.root.handlers)
    if is_json:
        logging.getLogger(program).error("%s", error)
    return is_json
