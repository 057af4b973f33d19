"""The page's door: foreign names, foreign pages, foreign tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from controller.dashboard.access import COOKIE, MARK, MAX_BODY_BYTES, Door
from controller.dashboard.routes import _log_in, _log_out
from protos.security import Security
from protos.tokens import Gatekeeper
from tests.fakes_security import make_token, write_tokens

HERE = "http://127.0.0.1:7780"
CHANGE = {"origin": HERE, MARK: "1"}


async def _told(request: Request) -> Response:
    return JSONResponse({"right": request.state.right.value})


def _client(security: Security | None = None, hosts: tuple[str, ...] = ()) -> TestClient:
    app = Starlette(
        routes=[
            Route("/", _told),
            Route("/login", _log_in, methods=["POST"]),
            Route("/logout", _log_out, methods=["POST"]),
            Route("/api/run", _told),
            Route("/api/freeze", _told, methods=["POST"]),
        ]
    )
    door = Door(app, keeper=Gatekeeper(security or Security()), hosts=hosts)
    return TestClient(door, base_url=HERE, follow_redirects=False)


@pytest.fixture(name="tokens")
def _tokens(tmp_path: Path) -> tuple[Security, str, str]:
    join, admin = make_token(), make_token()
    security = Security(
        join_token_file=write_tokens(tmp_path / "join", join),
        admin_token_file=write_tokens(tmp_path / "admin", admin),
    )
    return security, join, admin


@pytest.mark.parametrize("host", ["127.0.0.1:7780", "localhost:9", "[::1]:7780", "10.0.0.7", "ok"])
def test_own_names_and_plain_addresses_are_answered(host: str) -> None:
    assert _client(hosts=("ok",)).get("/api/run", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example:7780", "127.0.0.1.evil.example", "", "localhost.evil:80", "a:b"]
)
def test_a_foreign_name_that_was_made_to_point_here_is_refused(host: str) -> None:
    client = _client()
    for path in ("/", "/api/run"):
        assert client.get(path, headers={"host": host}).status_code == 421
    answer = client.post("/api/freeze", headers={**CHANGE, "host": host})
    assert answer.status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example", MARK: "1"},
        {"origin": "null", MARK: "1"},
        {"origin": "https://127.0.0.1:7780", MARK: "1"},
        {"origin": "http://127.0.0.1:7781", MARK: "1"},
        {"origin": HERE},
    ],
)
def test_a_change_that_another_page_asks_for_is_refused(headers: dict[str, str]) -> None:
    assert _client().post("/api/freeze", headers=headers).status_code == 403


def test_a_change_from_our_own_page_is_let_in() -> None:
    assert _client().post("/api/freeze", headers=CHANGE).status_code == 200


def test_another_page_gets_no_data_but_may_link_here() -> None:
    client, cross = _client(), {"sec-fetch-site": "cross-site"}
    assert client.get("/api/run", headers=cross).status_code == 403
    assert client.get("/", headers=cross).status_code == 200


def test_long_bodies_and_other_methods_are_refused() -> None:
    client = _client()
    long = {**CHANGE, "content-length": str(MAX_BODY_BYTES + 1)}
    assert client.post("/api/freeze", headers=long).status_code == 413
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert client.request(method, "/api/freeze", headers=CHANGE).status_code == 405


def test_every_answer_has_the_headers_that_keep_scripts_and_frames_out() -> None:
    for path in ("/", "/nowhere"):
        headers = _client().get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        # With no-referrer the log-in form would come with the Origin `null`, and be refused.
        assert headers["referrer-policy"] == "same-origin"
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_nothing_is_told_without_a_token(tokens: tuple[Security, str, str]) -> None:
    client = _client(tokens[0])
    assert client.get("/").headers["location"] == "/login"
    assert client.get("/api/run").status_code == 401
    assert client.post("/api/freeze", headers=CHANGE).status_code == 401
    for wrong in ("Bearer x", f"Basic {tokens[2]}", f"Bearer {make_token()}", ""):
        assert client.get("/api/run", headers={"authorization": wrong}).status_code == 401


def test_the_join_token_looks_and_the_admin_token_steers(tokens: tuple[Security, str, str]) -> None:
    security, join, admin = tokens
    client = _client(security)
    for token, steers in ((join, 403), (admin, 200)):
        shown = {"authorization": f"Bearer {token}"}
        assert client.get("/api/run", headers=shown).status_code == 200
        assert client.post("/api/freeze", headers={**shown, MARK: "1"}).status_code == steers
        # A token does not open the door to another page.
        foreign = {**shown, MARK: "1", "origin": "http://evil.example"}
        assert client.post("/api/freeze", headers=foreign).status_code == 403


def test_a_session_begins_with_a_token_and_ends_with_it(tokens: tuple[Security, str, str]) -> None:
    security, _, admin = tokens
    client = _client(security)
    assert security.admin_token_file is not None
    refused = client.post("/login", data={"token": make_token()}, headers={"origin": HERE})
    assert refused.headers["location"] == "/login#refused"
    assert COOKIE not in client.cookies
    begun = client.post("/login", data={"token": admin}, headers={"origin": HERE})
    assert begun.headers["location"] == "/"
    cookie = begun.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert admin not in cookie
    assert client.post("/api/freeze", headers=CHANGE).status_code == 200
    # A cookie comes along whoever asks; without an Origin nobody says who that is.
    assert client.post("/api/freeze", headers={MARK: "1"}).status_code == 403
    write_tokens(security.admin_token_file, make_token())
    assert client.get("/api/run").status_code == 401


def test_a_session_ends_when_its_user_logs_out(tokens: tuple[Security, str, str]) -> None:
    security, _, admin = tokens
    client = _client(security)
    client.post("/login", data={"token": admin}, headers={"origin": HERE})
    cookie = client.cookies[COOKIE]
    assert client.get("/api/run").status_code == 200
    client.post("/logout", headers={"origin": HERE})
    again = {"cookie": f"{COOKIE}={cookie}"}
    assert _client(security).get("/api/run", headers=again).status_code == 401
    assert client.get("/api/run", headers=again).status_code == 401


def test_another_page_cannot_log_a_user_in(tokens: tuple[Security, str, str]) -> None:
    security, _, admin = tokens
    answer = _client(security).post(
        "/login", data={"token": admin}, headers={"origin": "http://evil.example"}
    )
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers
