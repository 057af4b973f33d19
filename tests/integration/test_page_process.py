"""The page of a controller that is a process of its own, with and without TLS and tokens."""

from __future__ import annotations

import http.client
import json
import signal
import ssl
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from protos.client import AdminClient
from tests.fakes_controller import join_request, make_report
from tests.fakes_driver import Worker
from tests.fakes_page import END_S, page_run, served
from tests.fakes_security import Authority, make_token, write_tokens

pytestmark = pytest.mark.slow

DOMAINS = ("web", "code", "books")


def test_a_step_is_seen_within_a_second_and_an_order_is_obeyed(tmp_path: Path) -> None:
    page_run(tmp_path, DOMAINS, steps=40)
    with served(tmp_path / "run.yaml") as site:
        worker, admin = Worker(site.address), AdminClient(site.address)
        url = urlsplit(site.page)
        watching = http.client.HTTPConnection(url.netloc, timeout=20)
        asking = http.client.HTTPConnection(url.netloc, timeout=20)
        with closing(worker), closing(admin), closing(watching), closing(asking):
            watching.request("GET", "/api/events")
            stream = watching.getresponse()
            worker.client.join(join_request(0, 1))
            waits = []
            for step in range(6):
                reported_s = time.monotonic()
                worker.client.report(make_report(worker.spec, step=step))
                _hear(stream, step)
                waits.append(time.monotonic() - reported_s)
            # Of the machine's worse moments the median knows nothing; the first is one of its own.
            assert waits[0] < 1.0, waits
            assert sorted(waits)[len(waits) // 2] < 1.0, waits
            asking.request("POST", "/api/freeze", b"{}", {"X-Headrace": "1"})
            assert asking.getresponse().status == 200
            assert admin.status().frozen
        site.process.send_signal(signal.SIGTERM)
        assert site.process.wait(END_S) == 0


def _hear(stream: http.client.HTTPResponse, step: int) -> None:
    """Read events until one has the step."""
    while line := stream.readline():
        if line.startswith(b'data: {"epoch"') and json.loads(line[6:])["step"] >= step:
            return
    raise AssertionError(f"the stream ended before step {step}")


def test_with_tls_and_tokens_nothing_is_told_to_strangers(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls", "ours")
    cert, key = authority.issue("server")
    join, admin = make_token(), make_token()
    security = {
        "tls": {"cert": str(cert), "key": str(key), "ca": str(authority.pem)},
        "join_token_file": str(write_tokens(tmp_path / "join", join)),
        "admin_token_file": str(write_tokens(tmp_path / "admin", admin)),
    }
    page_run(tmp_path, DOMAINS, steps=40, security=security)
    with served(tmp_path / "run.yaml") as site:
        assert site.page.startswith("https://")
        place = urlsplit(site.page).netloc

        def ask(method: str, path: str, **headers: str) -> tuple[int, Any]:
            context = ssl.create_default_context(cafile=str(authority.pem))
            call = http.client.HTTPSConnection(place, timeout=20, context=context)
            with closing(call):
                call.request(method, path, b"{}" if method == "POST" else None, headers)
                answer = call.getresponse()
                return answer.status, answer.read()

        clear = http.client.HTTPConnection(place, timeout=20)
        with closing(clear):
            clear.request("GET", "/")
            with pytest.raises((http.client.HTTPException, OSError)):
                clear.getresponse()
        assert ask("GET", "/")[0] == 303
        assert ask("GET", "/api/run")[0] == 401
        assert ask("GET", "/assets/app.js")[0] == 401
        assert ask("GET", "/login")[0] == 200
        looks, steers = ({"Authorization": f"Bearer {token}"} for token in (join, admin))
        assert json.loads(ask("GET", "/api/run", **looks)[1])["may_steer"] is False
        assert json.loads(ask("GET", "/api/run", **steers)[1])["may_steer"] is True
        change = {"X-Headrace": "1", "Content-Type": "application/json"}
        assert ask("POST", "/api/freeze", **change)[0] == 403
        assert ask("POST", "/api/freeze", **change, Origin=f"https://{place}")[0] == 401
        assert ask("POST", "/api/freeze", **change, **looks)[0] == 403
        assert ask("POST", "/api/freeze", **change, **steers)[0] == 200
        assert ask("POST", "/api/freeze", **change, **steers, Origin="https://a.example")[0] == 403
        assert ask("GET", "/api/run", **steers, Host="evil.example")[0] == 421
