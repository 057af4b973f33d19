"""Every error has a status and comes back as itself."""

from __future__ import annotations

import grpc
import pytest

import protos.errors
from protos.channel import status_of
from protos.errors import STATUS_OF, HeadraceError, leaves


def test_every_error_has_a_status() -> None:
    assert set(leaves()) == set(STATUS_OF)


@pytest.mark.parametrize("error", list(STATUS_OF))
def test_a_status_is_one_of_grpcs(error: type[HeadraceError]) -> None:
    code, sentence, trailing = status_of(error("what was wrong"))
    assert code is not grpc.StatusCode.OK
    assert sentence == "what was wrong"
    assert getattr(protos.errors, trailing[0][1]) is error


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = protos.errors.__doc__ or ""
    for error in _below(HeadraceError):
        assert f" {error.__name__}" in drawn


def _below(base: type[HeadraceError]) -> set[type[HeadraceError]]:
    children = {child for child in base.__subclasses__() if child.__module__ == "protos.errors"}
    return children.union(*(_below(child) for child in children)) if children else children
