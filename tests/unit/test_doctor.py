"""`headrace doctor` finds what would stop a run, before it is started."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy.certificates import validity
from deploy.commands import app
from deploy.doctor import Finding, judge_versions
from deploy.doctor_network import examine_network
from deploy.doctor_report import examine
from deploy.doctor_run import examine_run
from tests.fakes_controller import run_document
from tests.fakes_security import Authority, make_token, write_tokens


def run_file(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_document(folder, **changes)))
    return path


def stops(path: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine_run(path) if finding.stops}


def test_a_run_file_that_cannot_be_read_is_one_finding(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: [")
    (finding,) = examine_run(path)
    assert finding.stops
    assert "run.yaml" in finding.found


def test_shards_that_are_not_there_are_named_with_their_domain(tmp_path: Path) -> None:
    (tmp_path / "there.tar").write_bytes(b"")
    domains = {
        "here": {"shards": [str(tmp_path / "there.tar")]},
        "gone": {"shards": [str(tmp_path / "gone-{0..2}.tar")]},
        "afar": {"shards": ["s3://bucket/{0..9}.tar"]},
    }
    found = stops(run_file(tmp_path, data={"domains": domains}))
    assert "domain here" not in found
    assert "domain afar" not in found
    assert "gone-0.tar" in found["domain gone"].found


@pytest.mark.parametrize(("mode", "fits"), [(0o600, True), (0o644, False)])
def test_a_token_that_others_may_read_is_found(tmp_path: Path, mode: int, fits: bool) -> None:
    files = {
        f"{name}_token_file": str(write_tokens(tmp_path / name, make_token()))
        for name in ("join", "admin")
    }
    path = run_file(tmp_path, security=files)
    (tmp_path / "join").chmod(mode)
    assert [each.ok for each in examine_run(path) if each.what == "join token"] == [fits]
    assert "admin token" not in stops(path)


@pytest.mark.parametrize(("days", "fits"), [(2, True), (-1, False)])
def test_a_certificate_that_is_over_is_found(tmp_path: Path, days: int, fits: bool) -> None:
    authority = Authority(tmp_path / "authority", "authority")
    cert, key = authority.issue("server", days=days)
    tls = {"cert": str(cert), "key": str(key), "ca": str(authority.pem)}
    path = run_file(tmp_path, security={"tls": tls})
    assert ("certificate" not in stops(path)) is fits
    # In a week it will be: no reason not to start, but worth a word.
    soon = [each for each in examine_run(path) if each.what == "certificate" and not each.ok]
    assert soon


def test_the_times_of_a_certificate_are_those_that_it_was_made_with(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    cert, _ = authority.issue("server", days=30)
    ((first, last),) = validity(cert.read_text())
    assert abs(first - datetime.now(UTC)) < timedelta(minutes=5)
    assert last - first == timedelta(days=30)
    assert len(validity(cert.read_text() + authority.pem.read_text())) == 2


@pytest.mark.parametrize("cut", [0, 1, 40, 100])
def test_a_damaged_certificate_is_refused(tmp_path: Path, cut: int) -> None:
    lines = Authority(tmp_path, "authority").pem.read_text().splitlines()
    body = "".join(lines[1:-1])[:cut]
    with pytest.raises(ValueError, match="certificate"):
        validity(f"{lines[0]}\n{body}\n{lines[-1]}\n")


def test_a_folder_that_cannot_be_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = stops(run_file(tmp_path, out=str(tmp_path / "file" / "out")))
    assert "file cannot be written to" in found["out"].found


def test_packages_older_than_asked_are_named() -> None:
    fine = judge_versions(["numpy>=1.0", "someone-elses>=99"])
    assert fine.ok
    old = judge_versions(["numpy>=99.1,<100", "grpcio>=1.0; extra == 'server'"])
    assert old.stops
    assert "numpy" in old.found
    assert "needed: 99.1" in old.found


class _Answering(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Refusing(_Answering):
    status = 401


@contextmanager
def _serving(host: str, handler: type[_Answering]) -> Iterator[int]:
    with http.server.ThreadingHTTPServer((host, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("host", "handler", "fits"),
    [
        ("0.0.0.0", _Answering, False),
        ("0.0.0.0", _Refusing, True),
        ("127.0.0.1", _Answering, True),
    ],
)
def test_a_dashboard_that_anyone_reaches_is_found(
    host: str, handler: type[_Answering], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with _serving(host, handler) as port:
        (finding,) = examine_network({port: "dashboard"})
    assert finding.ok is fits
    if not fits:
        assert f"dashboard at 0.0.0.0:{port}" in finding.found
        assert "RAY_AUTH_MODE=token" in finding.remedy


def test_the_command_takes_a_run_file_and_its_address(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        path = run_file(tmp_path, address=address)
        result = CliRunner().invoke(app, ["doctor", str(path), "--json"])
    findings = {each["what"]: each for each in json.loads(result.stdout)}
    assert result.exit_code == 2
    assert address in findings["port"]["found"]
    assert not findings["port"]["ok"]
    assert findings["clock"]["ok"]
    assert any(what.startswith("domain ") for what in findings)


def test_without_a_run_file_the_usual_port_is_looked_at() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    port = next(each for each in json.loads(result.stdout) if each["what"] == "port")
    assert "127.0.0.1:7700" in port["found"]


def test_a_run_file_that_cannot_be_read_leaves_the_usual_port(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: [")
    findings = {finding.what: finding for finding in examine(path, None)}
    assert "127.0.0.1:7700" in findings["port"].found
    assert findings["run file"].stops
