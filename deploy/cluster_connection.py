"""The connection of a command to a Ray cluster, or a sentence that says why there is none."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from protos.errors import ConfigError, ControllerUnreachable, HeadraceError
from protos.security import split_address

_KNOCK_S = 5.0
_CONNECT_S = 30.0


@contextmanager
def on_cluster(address: str | None, *, run: str | None) -> Iterator[None]:
    """Be connected to a cluster; None: what RAY_ADDRESS says, or the one of this machine.

    Raises:
        ControllerUnreachable: there is no cluster.
        ConfigError: it does not let this process in.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Imported here because it takes its settings from the environment when it is imported.
    import ray

    from deploy.placing import namespace

    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    _knock(where)
    try:
        with _for_at_most(_CONNECT_S, where):
            ray.init(
                address=where,
                namespace=namespace(run) if run else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:
        ray.shutdown()
        raise _not_let_in(where, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _not_let_in(where: str, error: Exception) -> HeadraceError:
    reason = str(error).strip().partition("\n")[0]
    if "authenti" in str(error).lower() or "token" in str(error).lower():
        return ConfigError(
            f"the Ray cluster at {where!r} wants its token: set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN_PATH to the file that holds it ({reason})"
        )
    if "Failed to connect" in reason:
        # Something listens there, and this is all that Ray says of a missing token.
        return ControllerUnreachable(
            f"the Ray cluster at {where!r} does not let this process in: {reason}; if it wants a "
            "token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file that holds it"
        )
    return ControllerUnreachable(
        f"no Ray cluster at {where!r}: {reason}; start one with `ray start --head`, or name it "
        "with --address or RAY_ADDRESS"
    )


def _knock(where: str) -> None:
    """See that something listens at HOST:PORT, of which Ray itself would never be sure.

    Raises:
        ControllerUnreachable: nothing does.
    """
    try:
        host, port = split_address(where.removeprefix("ray://"))
    except ConfigError:
        return
    try:
        socket.create_connection((host.strip("[]"), port), timeout=_KNOCK_S).close()
    except OSError as error:
        raise _not_let_in(where, error) from error


@contextmanager
def _for_at_most(timeout_s: float, where: str) -> Iterator[None]:
    """End this process if the block takes longer: `ray.init` asks for ever, deaf to signals."""

    def give_up() -> None:
        print(
            f"headrace: the Ray cluster at {where!r} did not let this process in within "
            f"{timeout_s:g} s. If it wants a token, set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file that holds it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
