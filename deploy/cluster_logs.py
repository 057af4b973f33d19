"""What actors of a run on a cluster have logged, read from the actors themselves."""

from __future__ import annotations

from collections.abc import Iterator

import ray

from deploy.placing import actors_of
from protos.errors import ConfigError, NotReady

_CALL_S = 30.0


def log_parts(run: str, who: str, *, last: int, follow: bool) -> Iterator[str | None]:
    """Yield what an actor has logged, in parts; None: there is no more at the moment.

    Raises:
        ConfigError: the run has no such actor.
    """
    start, pid = -last, 0
    while True:
        actors = actors_of(run)
        if who not in actors:
            there = ", ".join(sorted(actors)) or "nothing: it is not up on this cluster"
            raise ConfigError(f"run {run!r} has no {who!r}; it has {there}")
        try:
            part = ray.get(actors[who].log.remote(start), timeout=_CALL_S)
            if pid and part.pid != pid:
                yield f"--- {who} was started again as process {part.pid} ---\n"
                part = ray.get(actors[who].log.remote(0), timeout=_CALL_S)
        except ray.exceptions.RayActorError as error:
            if not follow:
                raise NotReady(f"the {who} is being started again") from error
            yield None
            continue
        start, pid = part.end, part.pid
        yield part.text
        if not part.text:
            if not follow:
                return
            yield None
