"""What the controller's actor does, in this process and without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.actor import ControllerHost
from controller.ledger import read_rows, reading_ledger
from controller.ledger_lock import LedgerLock
from controller.ledger_schema import Kind
from protos.client import AdminClient, healthy
from protos.errors import AlreadyServing, IndexMismatch, NotReady
from tests.fakes_controller import small_run

pytestmark = pytest.mark.slow


def test_a_host_serves_until_it_is_stopped_and_leaves_nothing_behind(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    host = ControllerHost(config)
    address = host.start()
    assert host.start() == address == host.address()
    assert healthy(address, timeout_s=5)
    host.check()
    admin = AdminClient(address)
    assert admin.status().phase == "waiting"
    admin.close()
    host.stop()
    host.stop()
    assert not healthy(address, timeout_s=1)
    LedgerLock(config.ledger_path).close()
    with reading_ledger(config.ledger_path) as database:
        assert [row.body["event"] for row in read_rows(database, Kind.EVENT)] == ["drained"]
    with pytest.raises(NotReady, match="has stopped"):
        host.check()


def test_a_host_that_cannot_serve_says_why(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    serving = ControllerHost(config)
    serving.start()
    second = ControllerHost(config)
    with pytest.raises(AlreadyServing, match="held by process"):
        second.start()
    with pytest.raises(AlreadyServing):
        second.check()
    second.stop()
    serving.stop()
    config.data.index.unlink()
    with pytest.raises(IndexMismatch):
        ControllerHost(config).start()
