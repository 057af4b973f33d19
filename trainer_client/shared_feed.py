"""A feed and a membership that peers share: see `peers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from protos.codec_common import spec_from_bytes, spec_to_bytes
from protos.documents import DocumentStarts
from protos.types import Cursors, Generation, Lane, Step
from trainer_client.delivered import DeliveredStep
from trainer_client.feed import Feed
from trainer_client.joining import Membership, Wanted
from trainer_client.peers import Arrays, Peers

_STEP_ARRAYS = ("tokens", "domain_ids", "num_tokens", "places")
_DOCUMENTS = tuple(field.name for field in dataclasses.fields(DocumentStarts))


def join_together(peers: Peers, wanted: Wanted, join: Callable[[], Membership]) -> Membership:
    """Return on every peer the membership that the leader joined as."""
    joined: list[Membership] = []

    def lead() -> Arrays:
        member = join()
        joined.append(member)
        spec = np.frombuffer(spec_to_bytes(member.spec), np.uint8)
        numbers = [member.generation, member.first_step]
        stands = [[int(lane), int(step)] for lane, step in member.cursor_steps.items()]
        return {
            "spec": spec,
            "numbers": np.array(numbers, np.int64),
            "stands": np.array(stands, np.int64).reshape(-1, 2),
            **_cursor_arrays(member.cursors),
        }

    arrays = peers.share(lead)
    if joined:
        return joined[0]
    generation, first_step = arrays["numbers"].tolist()
    return Membership(
        rank=wanted.rank,
        world_size=wanted.world_size,
        generation=Generation(generation),
        spec=spec_from_bytes(arrays["spec"].tobytes()),
        first_step=Step(first_step),
        endpoints={},
        cursors=_cursors(arrays),
        cursor_steps={Lane(lane): Step(step) for lane, step in arrays["stands"].tolist()},
        security=wanted.security,
    )


class SharedFeed:
    """Gives every peer the leader's steps; no step is shared before a peer asks for it."""

    def __init__(self, peers: Peers, feed: Feed | None) -> None:
        self._peers = peers
        self._feed = feed

    def has(self, step: Step) -> bool:
        """Say no: peers would have to look ahead at the same moment."""
        return False

    def take(self, step: Step) -> DeliveredStep:
        """Wait for a step and return it; all peers take it at the same place in their loops.

        Raises:
            HeadraceError: see `Feed.take`; on every peer.
        """
        taken: list[DeliveredStep] = []

        def lead() -> Arrays:
            assert self._feed is not None
            taken.append(self._feed.take(step))
            return _step_arrays(taken[0])

        arrays = self._peers.share(lead)
        return taken[0] if taken else _delivered(step, arrays)

    def hear_lanes(self, version: int) -> None:
        """Tell the leader's feed which version of the lanes' places the controller has."""
        if self._feed is not None:
            self._feed.hear_lanes(version)

    def close(self) -> None:
        """End the leader's streams."""
        if self._feed is not None:
            self._feed.close()


def _step_arrays(delivered: DeliveredStep) -> Arrays:
    arrays = {name: getattr(delivered, name) for name in _STEP_ARRAYS}
    slots = delivered.slots
    numbers = [delivered.plan_version, delivered.degraded, slots.start, slots.stop]
    arrays["numbers"] = np.array(numbers, np.int64)
    if delivered.documents is not None:
        for name in _DOCUMENTS:
            arrays[f"documents.{name}"] = np.asarray(getattr(delivered.documents, name))
    return {**arrays, **_cursor_arrays(delivered.cursors)}


def _delivered(step: Step, arrays: Arrays) -> DeliveredStep:
    plan_version, degraded, first_slot, end_slot = arrays["numbers"].tolist()
    documents: dict[str, Any] = {
        name: arrays[f"documents.{name}"] for name in _DOCUMENTS if f"documents.{name}" in arrays
    }
    return DeliveredStep(
        step=step,
        plan_version=plan_version,
        degraded=bool(degraded),
        slots=range(first_slot, end_slot),
        documents=DocumentStarts(**documents) if documents else None,
        cursors=_cursors(arrays),
        **{name: arrays[name] for name in _STEP_ARRAYS},
    )


def _cursor_arrays(cursors: Cursors) -> Arrays:
    return {f"cursor.{lane}": places for lane, places in cursors.items()}


def _cursors(arrays: Arrays) -> Cursors:
    return {
        Lane(int(name.removeprefix("cursor."))): places
        for name, places in arrays.items()
        if name.startswith("cursor.")
    }
