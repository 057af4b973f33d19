"""What a trainer's checkpoint keeps of the data: plain types only, one part a rank, mergeable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from protos.errors import ConfigError
from protos.types import Cursors, Lane, Resume, Step

STATE_VERSION = 1

LEDGER_HEAD = "ledger_head"
"""What the controller last said its ledger's last row is, for `headrace verify --head`."""

_PER_RUN = ("version", "run_id", "order_sha256", "step", "world_size")


def pack_state(
    *,
    run_id: str,
    order_sha256: str,
    step: Step,
    world_size: int,
    cursors: Cursors,
    ledger_head: str = "",
) -> dict[str, Any]:
    """Return a rank's state: strings, integers, lists and dictionaries."""
    return {
        "version": STATE_VERSION,
        "run_id": run_id,
        "order_sha256": order_sha256,
        "step": int(step),
        "world_size": world_size,
        "cursors": {str(lane): cursors[lane].tolist() for lane in sorted(cursors)},
        **_told(ledger_head),
    }


def unpack_state(state: Mapping[str, Any]) -> Resume:
    """Return what Join carries of a state.

    Raises:
        ConfigError: it is not one.
    """
    missing = [name for name in (*_PER_RUN, "cursors") if name not in state]
    if missing:
        raise ConfigError(
            f"the data state to resume from lacks {', '.join(missing)}: pass what "
            "Session.state_dict() returned"
        )
    if state["version"] != STATE_VERSION:
        raise ConfigError(
            f"the data state to resume from has version {state['version']!r}, this client reads "
            f"version {STATE_VERSION}: resume with the Headrace that wrote it"
        )
    try:
        return Resume(
            order_sha256=str(state["order_sha256"]),
            step=Step(int(state["step"])),
            cursors={
                Lane(int(lane)): np.asarray(places, dtype=np.uint32).reshape(-1, 3)
                for lane, places in state["cursors"].items()
            },
        )
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"the data state to resume from is damaged: {error}") from error


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the ranks' states of one checkpoint into one that any number of ranks can resume from.

    Raises:
        ConfigError: they are not of one checkpoint.
    """
    if not states:
        raise ConfigError("merge_states needs the state of every rank, got none")
    merged = {name: states[0].get(name) for name in _PER_RUN}
    for state in states:
        for name, value in merged.items():
            if state.get(name) != value:
                raise ConfigError(
                    f"states of different checkpoints cannot be merged: {name} is {value!r} in "
                    f"one and {state.get(name)!r} in another"
                )
    cursors: dict[str, Any] = {}
    for state in states:
        for lane, places in state.get("cursors", {}).items():
            if cursors.setdefault(lane, places) != places:
                raise ConfigError(
                    f"states of different checkpoints cannot be merged: two ranks place lane "
                    f"{lane} differently at step {merged['step']}"
                )
    return {
        **merged,
        "cursors": {lane: cursors[lane] for lane in sorted(cursors, key=int)},
        **_told(max((ledger_head_of(state) for state in states), key=_row)),
    }


def ledger_head_of(state: Mapping[str, Any]) -> str:
    """Return the ledger's head that a state holds; empty: none, as before there were any."""
    return str(state.get(LEDGER_HEAD, ""))


def _told(ledger_head: str) -> dict[str, str]:
    # Not with an empty value: torch.distributed.checkpoint loads what a fresh session's state
    # names, and a checkpoint of before there were heads has none.
    return {LEDGER_HEAD: ledger_head} if ledger_head else {}


def _row(ledger_head: str) -> int:
    row, _, _ = ledger_head.partition(":")
    return int(row) if row.isdecimal() else -1
