"""What may be bound without being asked for twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protos.errors import ConfigError
from protos.security import Security, check_bind


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:7700", "localhost:1", "[::1]:7700"])
def test_loopback_needs_no_word(address: str) -> None:
    check_bind(address, Security())


@pytest.mark.parametrize("address", ["0.0.0.0:7700", "[::]:7700", "192.0.2.1:7700", "myhost:1"])
def test_the_network_is_bound_only_on_request(address: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        check_bind(address, Security())
    check_bind(address, Security(insecure=True))


@pytest.mark.parametrize("address", ["", "7700", ":7700", "host:", "host:x", "host:70000", "h:-1"])
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        check_bind(address, Security())


def test_the_threat_table_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    table = (root / "deploy" / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", table))
    source = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    assert len(named) > 25
    assert {name for name in named if f"def {name}(" not in source} == set()
