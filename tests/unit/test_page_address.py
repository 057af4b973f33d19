"""`--dashboard`, with and without an address."""

from __future__ import annotations

import pytest

from controller.config_dashboard import DashboardSection
from deploy.cli import PAGE_ADDRESS, with_page_address


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["controller", "run.yaml"], ["controller", "run.yaml"]),
        (
            ["controller", "run.yaml", "--dashboard"],
            ["controller", "run.yaml", "--dashboard", PAGE_ADDRESS],
        ),
        (
            ["controller", "--dashboard", "run.yaml"],
            ["controller", "--dashboard", PAGE_ADDRESS, "run.yaml"],
        ),
        (["run", "--dashboard", "[::1]:0", "--json"], ["run", "--dashboard", "[::1]:0", "--json"]),
    ],
)
def test_the_page_has_an_address_of_its_own_where_none_follows(
    given: list[str], read: list[str]
) -> None:
    assert with_page_address(given) == read
    assert DashboardSection().address == PAGE_ADDRESS
