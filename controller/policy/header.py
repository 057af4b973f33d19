"""Which policy a saved state belongs to, so that no other takes it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from controller.policy.base import PolicyContext, PolicyState

HEADER = "header"

VERSION = 2
"""Of what policies save; grows when a state of before cannot be restored any more."""


def header_of(config: BaseModel, context: PolicyContext) -> dict[str, Any]:
    """Return what must be equal for a state to fit: policy, settings, domains."""
    return {
        "version": VERSION,
        "domains": list(context.domains),
        "settings": config.model_dump(mode="json"),
    }


def check_header(state: PolicyState, config: BaseModel, context: PolicyContext) -> None:
    """Refuse a state that another policy, or one with other settings, returned.

    A setting that the state does not name is newer than the state: it had its default, which keeps
    to what was done before there was the setting.

    Raises:
        ValueError: it is of another policy, other domains or other settings.
    """
    held = state.values.get(HEADER)
    wanted = header_of(config, context)
    if not isinstance(held, dict) or held.keys() != wanted.keys():
        raise ValueError("the state has no header of a policy; it cannot be restored")
    if held["version"] != VERSION:
        raise ValueError(
            f"the state was saved in version {held['version']}, this code reads {VERSION}"
        )
    if held["domains"] != wanted["domains"]:
        raise ValueError(
            f"the state is of domains {held['domains']}, the run has {wanted['domains']}"
        )
    theirs, ours = {**_defaults(config), **held["settings"]}, wanted["settings"]
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"the state is of a policy with {key} {theirs.get(key)!r}, "
                f"the run has {ours.get(key)!r}"
            )


def _defaults(config: BaseModel) -> dict[str, Any]:
    """Return the settings of a policy's kind that have a default, as JSON values."""
    return type(config).model_construct().model_dump(mode="json")
