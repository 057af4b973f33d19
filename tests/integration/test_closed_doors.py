"""No call of any service is let in without its token, nor over a connection of another kind."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from protos.client import AdminClient, ControlClient, healthy
from protos.errors import AccessRefused, ConfigError, ControllerUnreachable, NotAuthenticated
from protos.security import Security
from protos.server import serving_data
from protos.tokens import HEADER, RIGHT_OF, Gatekeeper, Right, bearer
from protos.types import Generation
from tests.fakes_security import (
    Authority,
    Method,
    call,
    every_method,
    make_token,
    shown,
    write_tokens,
)
from tests.fakes_services import ScriptedController, ScriptedWorker, serving

METHODS = list(every_method())
REFUSED = grpc.StatusCode.UNAUTHENTICATED
FORBIDDEN = grpc.StatusCode.PERMISSION_DENIED
NOT_REACHED = {
    REFUSED,
    FORBIDDEN,
    *(grpc.StatusCode[name] for name in ("UNAVAILABLE", "UNIMPLEMENTED", "INTERNAL", "UNKNOWN")),
}
"""What a call that is let in does not end with, though its empty message be refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Door:
    """Two servers and the tokens that open them."""

    controller: str
    worker: str
    join: str
    admin: str
    security: Security

    def address(self, method: Method) -> str:
        return self.worker if method.service == "headrace.v1.Data" else self.controller

    def token(self, right: Right) -> str:
        return self.join if right is Right.JOIN else self.admin


@contextmanager
def doors(folder: Path, **tls: Path) -> Iterator[Door]:
    join, admin = make_token(), make_token()
    security = Security(
        join_token_file=write_tokens(folder / "join", join),
        admin_token_file=write_tokens(folder / "admin", admin),
        **tls,  # type: ignore[arg-type]
    )
    with (
        serving(ScriptedController(), security=security) as controller,
        serving_data(ScriptedWorker(), address="127.0.0.1:0", security=security) as worker,
    ):
        yield Door(controller=controller, worker=worker, join=join, admin=admin, security=security)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with doors(tmp_path_factory.mktemp("door")) as opened:
        yield opened


def test_the_rights_name_every_service_that_is_served_and_no_other() -> None:
    assert {method.service for method in METHODS} == set(RIGHT_OF)
    assert len(METHODS) >= 14


@pytest.mark.fault_row(33, "no token, or a wrong one, at every method")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path)
def test_every_method_opens_to_its_own_token_alone(
    door: Door, method: Method, record_injections: Callable[..., None]
) -> None:
    wrong = {
        "none": [],
        "another": shown(make_token()),
        "part": shown(door.join[:-1]),
        "more": shown(door.join + "0"),
        "two": shown(door.join, door.admin),
        "same twice": shown(door.join, door.join),
        "no scheme": [(HEADER, door.join)],
        "other scheme": [(HEADER, f"Basic {door.admin}")],
        "empty": [(HEADER, "Bearer ")],
        "elsewhere": [("x-authorization", bearer(door.admin))],
    }
    with grpc.insecure_channel(door.address(method)) as channel:
        for name, metadata in wrong.items():
            code, sentence = call(channel, method.path, metadata)
            assert code is REFUSED, (name, code, sentence)
            assert door.join not in sentence
            record_injections()
        for right in Right:
            code, sentence = call(channel, method.path, shown(door.token(right)))
            if right in RIGHT_OF[method.service]:
                assert code not in NOT_REACHED, sentence
            else:
                assert code is FORBIDDEN, sentence
                assert "needs the" in sentence


def test_what_no_service_offers_is_refused_before_it_is_looked_for(door: Door) -> None:
    for path in ("/headrace.v1.Admin/Nothing", "/x.Y/Z", "/grpc.reflection.v1.ServerReflection/A"):
        with grpc.insecure_channel(door.controller) as channel:
            assert call(channel, path)[0] is REFUSED
            assert call(channel, path, shown(door.join))[0] is FORBIDDEN


def test_a_worker_that_knows_no_admin_token_takes_none(tmp_path: Path) -> None:
    join, admin = make_token(), make_token()
    guard = Security(join_token_file=write_tokens(tmp_path / "join", join))
    with (
        serving_data(ScriptedWorker(), address="127.0.0.1:0", security=guard) as worker,
        grpc.insecure_channel(worker) as channel,
    ):
        path = "/headrace.v1.Data/StreamBatches"
        assert call(channel, path, shown(admin))[0] is REFUSED
        assert call(channel, path, shown(join))[0] not in NOT_REACHED


def test_clients_show_the_token_of_their_kind(door: Door) -> None:
    control = ControlClient(door.controller, security=door.security)
    admin = AdminClient(door.controller, security=door.security)
    assert control.locate(Generation(1))
    assert next(control.watch_plans("w")).plans
    admin.freeze()
    assert healthy(door.controller, timeout_s=5, security=door.security)
    assert healthy(door.worker, timeout_s=5, security=door.security)
    control.close()
    admin.close()
    stranger = AdminClient(door.controller)
    with pytest.raises(NotAuthenticated, match="HEADRACE_ADMIN_TOKEN_FILE"):
        stranger.freeze()
    assert not healthy(door.controller, timeout_s=5)
    stranger.close()
    rank = AdminClient(
        door.controller, security=Security(admin_token_file=door.security.join_token_file)
    )
    with pytest.raises(AccessRefused, match="needs the admin token, and came with the join token"):
        rank.freeze()
    rank.close()


def test_refusals_fill_no_log(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(door.controller) as channel:
        for _ in range(30):
            call(channel, "/headrace.v1.Admin/Status", shown(make_token()))
    assert len([record for record in caplog.records if "refused" in record.message]) <= 2


def test_tokens_are_compared_in_constant_time(tmp_path: Path) -> None:
    """Every known hash is compared, wherever the right one stands, by `hmac.compare_digest`."""
    tokens = [make_token() for _ in range(4)]
    keeper = Gatekeeper(
        Security(
            join_token_file=write_tokens(tmp_path / "join", *tokens[:2]),
            admin_token_file=write_tokens(tmp_path / "admin", *tokens[2:]),
        )
    )
    source = inspect.getsource(Gatekeeper.right_of)
    assert "compare_digest" in source
    assert "return found" in source
    assert "break" not in source
    for token in tokens:
        right = Right.JOIN if token in tokens[:2] else Right.ADMIN
        for asked in Right:
            service = "headrace.v1.Control" if asked is Right.JOIN else "headrace.v1.Admin"
            refusal = keeper.refusal(f"/{service}/X", shown(token))
            assert (refusal is None) is (asked is right)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def encrypted(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    cert, key = authority.issue("server")
    folder = tmp_path_factory.mktemp("door")
    with doors(folder, cert=cert, key=key, ca=authority.pem) as opened:
        yield opened


@pytest.fixture(scope="module")
def mutual(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    cert, key = authority.issue("mutual")
    pem = authority.pem
    folder = tmp_path_factory.mktemp("mutual")
    with doors(folder, cert=cert, key=key, ca=pem, client_ca=pem) as opened:
        yield opened


@pytest.mark.fault_row(33, "plaintext to a TLS port, at every method")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path)
def test_no_method_answers_in_the_clear(
    encrypted: Door, method: Method, record_injections: Callable[..., None]
) -> None:
    began = time.monotonic()
    with grpc.insecure_channel(encrypted.address(method)) as channel:
        for right in Right:
            code, _ = call(channel, method.path, shown(encrypted.token(right)))
            assert code is grpc.StatusCode.UNAVAILABLE
            record_injections()
    assert time.monotonic() - began < 2


@pytest.mark.fault_row(33, "no certificate where both ends need one, at every method")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path)
def test_no_method_answers_without_a_certificate(
    mutual: Door, method: Method, record_injections: Callable[..., None]
) -> None:
    assert mutual.security.ca is not None
    ca = mutual.security.ca.read_bytes()
    began = time.monotonic()
    with grpc.secure_channel(mutual.address(method), grpc.ssl_channel_credentials(ca)) as channel:
        for right in Right:
            code, _ = call(channel, method.path, shown(mutual.token(right)))
            assert code is grpc.StatusCode.UNAVAILABLE
            record_injections()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("kind", ["encrypted", "mutual"])
def test_clients_with_files_and_tokens_are_let_in(
    kind: str, request: pytest.FixtureRequest
) -> None:
    door: Door = request.getfixturevalue(kind)
    control = ControlClient(door.controller, security=door.security)
    assert control.locate(Generation(1))
    control.close()
    assert healthy(door.worker, timeout_s=5, security=door.security)


def test_encryption_alone_opens_nothing(mutual: Door) -> None:
    whole = mutual.security
    tokenless = Security(ca=whole.ca, cert=whole.cert, key=whole.key)
    client = ControlClient(mutual.controller, security=tokenless)
    with pytest.raises(NotAuthenticated):
        client.locate(Generation(1))
    client.close()


@pytest.mark.fault_row(33, "a certificate expired, not valid yet, of another name or authority")
def test_certificates_that_are_wrong_are_refused_soon(
    authority: Authority, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    other = Authority(tmp_path, "other")
    for name, issued in {
        "expired": authority.issue("expired", days=-1),
        "not valid yet": authority.issue_for_later("later"),
        "of another name": authority.issue("elsewhere", names="DNS:elsewhere.example"),
        "of another authority": other.issue("server"),
    }.items():
        cert, key = issued
        with doors(tmp_path, cert=cert, key=key, ca=authority.pem) as door:
            client = ControlClient(door.controller, security=door.security)
            began = time.monotonic()
            with pytest.raises(ControllerUnreachable, match=r"CERTIFICATE_VERIFY|Hostname Verif"):
                client.locate(Generation(1))
            assert time.monotonic() - began < 2, name
            client.close()
            record_injections(1, name)


def test_a_rank_of_another_authority_is_refused(mutual: Door, tmp_path: Path) -> None:
    cert, key = Authority(tmp_path, "other").issue("rank")
    whole = mutual.security
    security = Security(ca=whole.ca, cert=cert, key=key, join_token_file=whole.join_token_file)
    client = ControlClient(mutual.controller, security=security)
    with pytest.raises(ControllerUnreachable):
        client.locate(Generation(1))
    client.close()


def test_a_name_can_stand_in_for_the_address(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("pods", names="DNS:headrace.internal")
    with doors(tmp_path, cert=cert, key=key) as door:
        security = Security(
            ca=authority.pem,
            server_name="headrace.internal",
            join_token_file=door.security.join_token_file,
        )
        client = ControlClient(door.controller, security=security)
        assert client.locate(Generation(1))
        client.close()


def test_what_cannot_guard_is_said_before_anything_is_served(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    cert, _ = authority.issue("one")
    _, other_key = authority.issue("two")
    same = make_token()
    join, admin = write_tokens(tmp_path / "j", same), write_tokens(tmp_path / "a", same)
    short, many = tmp_path / "short", write_tokens(tmp_path / "many", *[make_token()] * 3)
    open_to_all = write_tokens(tmp_path / "open", make_token())
    write_tokens(short, "too-short")
    open_to_all.chmod(0o644)
    for sentence, security in {
        "not the key of": Security(cert=cert, key=other_key),
        "cannot read": Security(join_token_file=tmp_path / "missing"),
        "no certificate in PEM form": Security(cert=join, key=other_key),
        "hold the same token": Security(join_token_file=join, admin_token_file=admin),
        "32 to 512": Security(join_token_file=short),
        "at most 2": Security(join_token_file=many),
        "chmod 600": Security(join_token_file=open_to_all),
    }.items():
        with (
            pytest.raises(ConfigError, match=sentence) as raised,
            serving_data(ScriptedWorker(), address="127.0.0.1:0", security=security),
        ):
            pass
        assert same not in str(raised.value)
