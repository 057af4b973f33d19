"""Whole runs with TLS and tokens: they work, and no token is anywhere but in its file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.fakes_consumer import ROOT, WorkerProcess, write_corpus, write_run
from tests.fakes_security import Authority, make_token, write_tokens
from tests.harness_runs import harness_run, wait_until
from tests.harness_runs import write_corpus as write_texts

pytestmark = pytest.mark.timeout(240)

_END_S = 60.0

RANK = """
import sys
import trainer_client
with trainer_client.connect(sys.argv[1], rank=0, world_size=1) as session:
    print(repr(f"joined {vars(session)} {session._member.security}"), flush=True)
    for batch in session.batches(64):
        session.end_step()
    session._reporter.flush(timeout_s=30)
    print("sent", session.reports_sent, flush=True)
    sys.stdin.read()
"""


class Secrets:
    """A run's tokens, its files, and where they must not be found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "secrets"
        authority = Authority(self.folder, "authority")
        self.ca = authority.pem
        self.cert, self.key = authority.issue("everybody")
        self.tokens = {name: make_token() for name in ("join", "admin")}
        for name, token in self.tokens.items():
            write_tokens(self.folder / name, token)

    @property
    def section(self) -> dict[str, object]:
        """The run file's `security`."""
        tls = {"cert": self.cert, "key": self.key, "ca": self.ca, "client_ca": self.ca}
        return {
            "tls": {name: str(path) for name, path in tls.items()},
            "join_token_file": str(self.folder / "join"),
            "admin_token_file": str(self.folder / "admin"),
        }

    def options(self, token: str) -> list[str]:
        """Return the options of a command that shows a token."""
        files = {"token-file": self.folder / token, "ca": self.ca}
        files |= {"cert": self.cert, "key": self.key}
        return [word for name, path in files.items() for word in (f"--{name}", str(path))]

    def variables(self) -> dict[str, str]:
        """Return the environment of a rank."""
        files = {"JOIN_TOKEN_FILE": self.folder / "join", "CA": self.ca}
        files |= {"CERT": self.cert, "KEY": self.key}
        return {f"HEADRACE_{name}": str(path) for name, path in files.items()}

    def assert_not_in(self, what: str, data: bytes) -> None:
        for name, token in self.tokens.items():
            assert token.encode() not in data, f"the {name} token is in {what}"

    def assert_not_below(self, folder: Path) -> int:
        """Look into every file below a folder; return how many bytes there were."""
        num_bytes = 0
        for path in sorted(folder.rglob("*")):
            if path.is_file() and self.folder not in path.parents:
                data = path.read_bytes()
                self.assert_not_in(str(path), data)
                num_bytes += len(data)
        return num_bytes

    def assert_not_in_processes(self, processes: Sequence[psutil.Process]) -> int:
        """Look at arguments and variables; return how many processes there were."""
        num_seen = 0
        for process in processes:
            try:
                words = [*process.cmdline(), *map("=".join, process.environ().items())]
            except (psutil.Error, OSError):
                continue
            self.assert_not_in(f"process {process.pid}", "\0".join(words).encode())
            num_seen += 1
        return num_seen


@contextmanager
def _started(command: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(_END_S)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _headrace(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_END_S,
    )


@pytest.mark.slow
def test_parts_that_are_started_by_hand_show_no_token(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path)
    patterns = write_corpus(tmp_path / "data")
    run_file = write_run(tmp_path / "out", patterns, steps=12, security=secrets.section)
    logs = tmp_path / "logs"
    logs.mkdir()
    with ExitStack() as stack:
        controller = stack.enter_context(
            _started(["-m", "controller", str(run_file), "--verbose"], logs / "controller")
        )
        address = _line(controller).split()[-1]
        worker = WorkerProcess(
            address,
            "w0",
            cache=tmp_path / "cache",
            log=logs / "worker",
            options=[*secrets.options("join"), "--client-ca", str(secrets.ca)],
        )
        stack.callback(worker.end, signal.SIGTERM)
        rank = stack.enter_context(
            _started(["-c", RANK, address], logs / "rank", **secrets.variables())
        )
        joined = _line(rank)
        assert joined, (logs / "rank").read_text()
        sent = _line(rank)
        assert sent == "sent 12\n", (logs / "rank").read_text()
        status = _headrace("status", address, "--json", *secrets.options("admin"))
        assert json.loads(status.stdout)["observed_step"] == 11
        frozen = _headrace("freeze", address, *secrets.options("admin"))
        assert frozen.returncode == 0
        steered = _headrace("mixture", "set", address, "code=1", *secrets.options("join"))
        assert steered.returncode == 2
        assert "needs the admin token" in steered.stderr
        unknown = _headrace("status", address, *secrets.options("admin")[2:])
        assert unknown.returncode == 2
        assert "no token came with the call" in unknown.stderr
        bare = _headrace("status", address)
        assert bare.returncode == 1
        pids = [process.pid for process in (controller, worker.process, rank)]
        assert secrets.assert_not_in_processes([psutil.Process(pid) for pid in pids]) == len(pids)
        for done in (status, frozen, steered, unknown, bare):
            secrets.assert_not_in(str(done.args), (done.stdout + done.stderr).encode())
        secrets.assert_not_in("what the rank printed", joined.encode())
    # Ledger, snapshots, cache, logs of three processes, run file.
    assert (tmp_path / "out" / "ledger.sqlite").is_file()
    assert (logs / "controller").stat().st_size > 0
    assert secrets.assert_not_below(tmp_path) > 10_000


@pytest.mark.long
def test_a_local_run_with_tls_and_tokens_ends_well_and_shows_none(tmp_path: Path) -> None:
    secrets, out = Secrets(tmp_path), tmp_path / "out"
    data = write_texts(tmp_path / "data")
    options = ["--steps", "12", "--sequence-length", "32", "--global-sequences", "8"]
    options += ["--lanes", "4", "--workers", "1", "--ranks", "1", "--policy", "uniform"]
    options += ["--set", "batch.window_samples=8"]
    options += ["--set", f"security={json.dumps(secrets.section)}"]
    arguments = ["--data", str(data), "--out", str(out), *options]
    with harness_run(arguments, log=tmp_path / "log") as run:
        received = out / "received" / "received.rank0.jsonl"
        wait_until(
            lambda: run.process.poll() is not None or received.exists(), timeout_s=90, what="a step"
        )
        # Harness, Ray's own, controller, worker, torchrun, rank.
        assert secrets.assert_not_in_processes(run.processes()) > 5
        assert run.process.wait(120) == 0, run.text()
    report = json.loads((out / "report.json").read_text())
    assert (report["steps"], report["lost"], report["duplicated"]) == (12, 0, 0)
    assert secrets.assert_not_below(tmp_path) > 10_000
