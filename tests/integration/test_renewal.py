"""Certificates, authorities and tokens that change while everything runs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from protos.client import AdminClient, ControlClient
from protos.errors import ControllerUnreachable, NotAuthenticated
from protos.security import Security
from protos.types import Generation
from tests.fakes_security import Authority, make_token, write_tokens
from tests.fakes_services import ScriptedController, serving
from tests.fakes_trainer import FakeRun, make_spec, wait_until
from tests.faults.tcp_proxy import FaultProxy
from trainer_client import connect


def put(source: Path, target: Path) -> None:
    """Put a file in another's place at once, as whoever renews it does."""
    fresh = target.with_suffix(".fresh")
    shutil.copyfile(source, fresh)
    fresh.chmod(0o600)
    fresh.replace(target)


@pytest.fixture
def security(tmp_path: Path) -> Security:
    """The files of a run in mutual TLS, to be renewed."""
    authority = Authority(tmp_path, "first")
    cert, key = authority.issue("own")
    put(authority.pem, tmp_path / "ca")
    put(authority.pem, tmp_path / "client-ca")
    return Security(
        ca=tmp_path / "ca",
        cert=cert,
        key=key,
        client_ca=tmp_path / "client-ca",
        join_token_file=write_tokens(tmp_path / "join", make_token()),
        admin_token_file=write_tokens(tmp_path / "admin", make_token()),
    )


def locates(client: ControlClient) -> bool:
    try:
        return bool(client.locate(Generation(1)))
    except ControllerUnreachable:
        return False


def fresh_client_locates(address: str, security: Security) -> bool:
    with closing(ControlClient(address, security=security)) as client:
        return locates(client)


@pytest.mark.fault_row(
    33, "certificates and authorities renewed while all runs, half of a pair first"
)
def test_a_servers_certificate_and_authority_are_renewed_while_it_serves(
    security: Security, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    assert security.ca
    assert security.cert
    assert security.key
    assert security.client_ca
    second = Authority(tmp_path / "second", "second")
    cert, key = second.issue("own")
    old_files = Security(
        ca=tmp_path / "old-ca",
        cert=tmp_path / "old-cert",
        key=tmp_path / "old-key",
        join_token_file=security.join_token_file,
    )
    for source, target in zip(
        (security.ca, security.cert, security.key),
        (old_files.ca, old_files.cert, old_files.key),
        strict=True,
    ):
        assert target is not None
        put(source, target)
    with (
        serving(ScriptedController(), security=security) as address,
        closing(ControlClient(address, security=security)) as client,
    ):
        stream = client.watch_plans("w")
        assert next(stream).plans
        # The pair does not fit while only one half of it is new: the old one stays in force.
        put(cert, security.cert)
        assert fresh_client_locates(address, old_files)
        put(key, security.key)
        assert not fresh_client_locates(address, security)  # its authority is the first one still
        put(second.pem, security.ca)
        put(second.pem, security.client_ca)
        assert locates(client), "the same client, with what its files hold now"
        assert fresh_client_locates(address, security)
        assert not fresh_client_locates(address, old_files)
        record_injections(2, "a pair in halves; a removed authority")
        stream.cancel()


@pytest.mark.fault_row(33, "a rank's authority removed")
def test_a_rank_whose_authority_was_removed_gets_in_no_more(
    security: Security, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    assert security.ca
    assert security.client_ca
    with serving(ScriptedController(), security=security) as address:
        assert fresh_client_locates(address, security)
        put(Authority(tmp_path / "other", "other").pem, security.client_ca)
        assert not fresh_client_locates(address, security)
        record_injections(1)


def test_tokens_are_renewed_in_two_steps_without_a_refused_call(
    security: Security, caplog: pytest.LogCaptureFixture
) -> None:
    """All files hold the old and the new, then the new alone; a client shows the first."""
    assert security.join_token_file
    assert security.admin_token_file
    paths = (security.join_token_file, security.admin_token_file)
    servers = {path: path.with_name(f"server-{path.name}") for path in paths}
    for path, served in servers.items():
        put(path, served)
    guard = Security(
        join_token_file=servers[security.join_token_file],
        admin_token_file=servers[security.admin_token_file],
    )
    shown = Security(
        join_token_file=security.join_token_file, admin_token_file=security.admin_token_file
    )
    with (
        serving(ScriptedController(), security=guard) as address,
        closing(ControlClient(address, security=shown)) as client,
        closing(AdminClient(address, security=shown)) as admin,
    ):

        def both_are_let_in() -> None:
            assert client.locate(Generation(1))
            admin.freeze()

        both_are_let_in()
        for path, served in servers.items():
            old, new = path.read_text().strip(), make_token()
            write_tokens(served, old, new)
            both_are_let_in()
            write_tokens(path, new)
            both_are_let_in()
            write_tokens(served, new)
            both_are_let_in()
            write_tokens(path, old)
            with pytest.raises(NotAuthenticated, match="not known here"):
                both_are_let_in()
            write_tokens(path, new)
            both_are_let_in()
            # A file that is damaged or gone changes nothing.
            served.write_text("")
            both_are_let_in()
            served.unlink()
            both_are_let_in()
    assert caplog.text.count("stays in force") == 4


@pytest.mark.fault_row(33, "a token renewed at the servers before the ranks")
def test_training_goes_on_while_a_token_is_renewed_in_the_wrong_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, record_injections: Callable[..., None]
) -> None:
    """Servers first: what ranks report is dropped, a broken stream waits, and all comes again."""
    caplog.set_level(logging.DEBUG, logger="trainer_client")
    old, renewed = make_token(), make_token()
    guard = Security(join_token_file=write_tokens(tmp_path / "served", old))
    shown = Security(join_token_file=write_tokens(tmp_path / "shown", old))
    run = FakeRun(make_spec(num_steps=14), security=guard)
    run.workers[0].break_before = {10}
    with (
        run.serving(),
        connect(run.address, rank=0, world_size=1, security=shown) as session,
    ):
        steps = []
        for batch in session.batches(64):
            steps.append(int(batch.step))
            session.end_step()
            if batch.step == 0:
                wait_until(lambda: session.reports_sent == 1)
                write_tokens(tmp_path / "served", renewed)
            if batch.step == 9:  # the stream of the step after this has broken
                wait_until(lambda: "lets nobody in" in caplog.text)
                wait_until(lambda: session.reports_dropped == 9)
                write_tokens(tmp_path / "shown", renewed)
        assert steps == list(range(run.spec.num_steps))
        wait_until(lambda: session.reports_sent == run.spec.num_steps - 9)
        record_injections(session.reports_dropped, "reports refused; batches came on")
    assert old not in caplog.text
    assert renewed not in caplog.text


def _counts(proxy: FaultProxy, connections: int) -> bool:
    return proxy.counts.connections >= connections


@pytest.mark.fault_row(
    33, "the controller's certificate goes wrong in mid-training, and is renewed"
)
@pytest.mark.parametrize("kind", ["expired", "not valid yet", "of another name", "other authority"])
def test_training_goes_on_while_the_controller_shows_a_wrong_certificate(
    kind: str, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    authority = Authority(tmp_path / "authority", "authority")
    wrong = {
        "expired": lambda: authority.issue("expired", days=-1),
        "not valid yet": lambda: authority.issue_for_later("later"),
        "of another name": lambda: authority.issue("elsewhere", names="DNS:elsewhere.example"),
        "other authority": lambda: Authority(tmp_path / "other", "other").issue("own"),
    }[kind]()
    good = authority.issue("own")
    cert, key = tmp_path / "cert", tmp_path / "key"

    def show(pair: tuple[Path, Path]) -> None:
        put(pair[0], cert)
        put(pair[1], key)

    show(good)
    tokens = write_tokens(tmp_path / "join", make_token())
    run = FakeRun(
        make_spec(num_steps=16),
        security=Security(cert=good[0], key=good[1], join_token_file=tokens),
        controllers_own=Security(cert=cert, key=key, join_token_file=tokens),
    )
    shown = Security(ca=authority.pem, join_token_file=tokens)
    with (
        run.serving(),
        FaultProxy(run.address) as proxy,
        connect(proxy.address, rank=0, world_size=1, security=shown) as session,
    ):
        steps = []
        for batch in session.batches(64):
            steps.append(int(batch.step))
            session.end_step()
            if batch.step == 3:
                wait_until(lambda: session.reports_sent == 4)
                show(wrong)
                refused_at = proxy.counts.connections + 3
                assert proxy.reset_all() > 0
            if batch.step == 10:
                wait_until(partial(_counts, proxy, refused_at))
                assert session.reports_sent == 4
                record_injections(3, "handshakes refused, or more")
                show(good)
        assert steps == list(range(run.spec.num_steps))
        wait_until(
            lambda: session.reports_sent + session.reports_dropped == run.spec.num_steps,
            timeout_s=30,
        )
        # One that was tried for long meanwhile may have been given up.
        assert session.reports_dropped <= 1
