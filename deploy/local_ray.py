"""A Ray of this run's own, on this machine, that leaves nothing behind."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.processes import Family, StopSignals
from protos.errors import ConfigError, HeadraceError

PACKAGE_ROOT = Path(__file__).resolve().parents[1]

_OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes; batches do not pass through it."""

_SHUTDOWN_S = 10.0
"""How long Ray may take to end its processes."""

_SHUTDOWN_AT_LEAST_S = 0.8
"""It has so long even when somebody is in a hurry: it needs this on an idle machine."""

_MAX_SOCKET_PATH = 107
"""Of a Unix socket, in bytes."""

_SOCKET_SUFFIX = "/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for all temporary files, of this process and of its children; remove it.

    Libraries leave things behind in theirs. Its name is short, as Ray puts sockets deep below it.
    """
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) + len("/hr-12345678") + len(_SOCKET_SUFFIX) > _MAX_SOCKET_PATH:
        base = Path("/tmp")
    former = tempfile.tempdir
    folder = Path(tempfile.mkdtemp(prefix="hr-", dir=base))
    try:
        with _environment({"TMPDIR": str(folder)}):
            tempfile.tempdir = str(folder)
            yield folder
    finally:
        tempfile.tempdir = former
        shutil.rmtree(folder, ignore_errors=True)


def python_path() -> str:
    """Return PYTHONPATH for processes that must find this Headrace, installed or not."""
    paths = [str(PACKAGE_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(path for path in dict.fromkeys(paths) if path)


@contextmanager
def local_ray(
    folder: Path, *, num_actors: int, logs: Path, family: Family, stop: StopSignals
) -> Iterator[None]:
    """Run a Ray for `num_actors` actors until the end of the block; to be used once a process.

    What the actors wrote is copied to `logs` at the end. All of `family` ends with it.

    Raises:
        HeadraceError: Ray does not start.
    """
    if "ray" in sys.modules:
        raise ConfigError("a local run cannot use a Ray that this process has imported already")
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's ports are open to whoever reaches this machine, and run what they are sent.
        "RAY_AUTH_MODE": "token",
        # In a file, as variables are passed on to everything that is started.
        "RAY_AUTH_TOKEN": "",
        "RAY_AUTH_TOKEN_PATH": str(_token_file(folder)),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Else SIGTERM while it starts would have it wait for work that nobody has given.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # The harness says itself what died; Ray's own words would tear its display.
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
        "PYTHONPATH": python_path(),
    }
    with _environment(environment):
        # Imported here because it takes its settings from the environment when it is imported.
        import ray

        try:
            ray.init(
                address="local",
                include_dashboard=False,
                # Logical: one for each actor, however few the machine has.
                num_cpus=num_actors,
                num_gpus=0,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
        except KeyboardInterrupt:
            _shut_down(family, stop)
            raise
        except SystemExit:
            # Ray's answer to SIGTERM, which it takes while it starts; a second one is ours.
            stop.heard(signal.SIGTERM)
            _shut_down(family, stop)
            raise KeyboardInterrupt from None
        except Exception as error:
            _shut_down(family, stop)
            reason = str(error).partition("\n")[0]
            raise HeadraceError(
                f"Ray did not start: {reason}; `headrace doctor` says what it lacks"
            ) from error
        stop.install()
        try:
            yield
        finally:
            _shut_down(family, stop)
            _keep_logs(folder, logs)


def _shut_down(family: Family, stop: StopSignals) -> None:
    """End Ray and all that it started; those that take too long are killed meanwhile."""
    import ray

    patience_s = max(stop.patience_s(_SHUTDOWN_S), _SHUTDOWN_AT_LEAST_S)
    killer = threading.Timer(patience_s, family.end)
    killer.daemon = True
    killer.start()
    try:
        # Also where its processes are dead: it must let go of them, or it would end this one.
        ray.shutdown()
    finally:
        killer.cancel()
        family.end()


def _token_file(folder: Path) -> Path:
    """Write a token for this Ray alone, which only this user can read."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    return path


def _keep_logs(folder: Path, logs: Path) -> None:
    """Copy what actors wrote, without what Ray writes into every log."""
    for log in sorted(folder.glob("session_2*/logs/worker-*")):
        if log.suffix not in (".out", ".err"):
            continue
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        told = [line for line in lines if not line.startswith((":job_id:", ":actor_name:"))]
        names = [line.strip().rpartition(":")[2] for line in lines if line.startswith(":actor_")]
        if told and names:
            logs.mkdir(parents=True, exist_ok=True)
            process_id = log.stem.rpartition("-")[2]
            (logs / f"{names[0]}-{process_id}{log.suffix}").write_text("".join(told))


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                with contextlib.suppress(KeyError):
                    del os.environ[name]
            else:
                os.environ[name] = value
