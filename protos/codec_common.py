"""Our types <-> messages, for what more than one service carries: a pair of functions a type.

Every field that arrives is bounded and checked here; what is wrong raises InvalidMessage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from protos.errors import InvalidMessage
from protos.spec import CONCATENATE, ProbeSpec, RunSpec, ValidationSpec
from protos.types import (
    Cursors,
    Lane,
    LaneEndpoint,
    Mixture,
    Places,
    Plan,
    Quarantine,
    Step,
)
from protos.wire import common_pb2 as common

_PLACES = np.dtype("<u4")


P = ParamSpec("P")


R = TypeVar("R")


def field_names(of: type, *, but: set[str]) -> tuple[str, ...]:
    """Return the fields of a dataclass that its message has under the same names and types."""
    return tuple(item.name for item in dataclasses.fields(of) if item.name not in but)


def checked(decode: Callable[P, R]) -> Callable[P, R]:
    """Turn what a type refuses at birth into InvalidMessage."""

    @wraps(decode)
    def decode_or_refuse(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return decode(*args, **kwargs)
        except (ValueError, OverflowError) as error:
            raise InvalidMessage(
                f"{decode.__name__.removesuffix('_from_proto')}: {error}"
            ) from error

    return decode_or_refuse


def array_from_bytes(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """View bytes as an array without a copy; -1 in the first place of `shape` is worked out.

    Raises:
        ValueError: the length does not fit.
    """
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    rows = len(data) // row_bytes if shape[0] < 0 else shape[0]
    if rows * row_bytes != len(data):
        raise ValueError(f"expected {dtype.str} {list(shape)}, got {len(data)} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(rows, *shape[1:])


def places_to_bytes(places: NDArray[np.uint32]) -> bytes:
    """Pack [n, 3] places."""
    return np.ascontiguousarray(places, dtype=_PLACES).tobytes()


def places_from_bytes(data: bytes) -> Places:
    """Unpack [n, 3] places."""
    return array_from_bytes(data, _PLACES, (-1, 3))


def cursors_to_proto(cursors: Cursors, step_of: Mapping[Lane, Step] | Step) -> list[common.Cursor]:
    """Encode lanes' places, each before its step."""
    return [
        common.Cursor(
            lane=lane,
            step=step_of if isinstance(step_of, int) else step_of[lane],
            places=places_to_bytes(places),
        )
        for lane, places in cursors.items()
    ]


@checked
def cursors_from_proto(messages: Iterable[common.Cursor]) -> tuple[Cursors, dict[Lane, Step]]:
    """Decode lanes' places and the steps before which they stand."""
    cursors: Cursors = {}
    steps: dict[Lane, Step] = {}
    for message in messages:
        cursors[Lane(message.lane)] = places_from_bytes(message.places)
        steps[Lane(message.lane)] = Step(message.step)
    return cursors, steps


def mixture_to_proto(mixture: Mixture) -> common.Mixture:
    """Encode a mixture."""
    return common.Mixture(shares_q32=mixture.shares_q32)


@checked
def mixture_from_proto(message: common.Mixture) -> Mixture:
    """Decode a mixture."""
    return Mixture(tuple(message.shares_q32))


def plan_to_proto(plan: Plan) -> common.Plan:
    """Encode a plan."""
    return common.Plan(
        version=plan.version,
        first_step=plan.first_step,
        mixture=mixture_to_proto(plan.mixture),
        carry_q32=plan.carry_q32,
    )


@checked
def plan_from_proto(message: common.Plan) -> Plan:
    """Decode a plan."""
    return Plan(
        version=message.version,
        first_step=Step(message.first_step),
        mixture=mixture_from_proto(message.mixture),
        carry_q32=tuple(message.carry_q32),
    )


_PROBE_FIELDS = field_names(ProbeSpec, but={"layers"})


_SPEC_FIELDS = field_names(RunSpec, but={"domains", "probe", "validation"})


def spec_to_proto(spec: RunSpec) -> common.RunSpec:
    """Encode a run's settings."""
    message = common.RunSpec(
        domains=spec.domains,
        validation=[
            common.ValidationSpec(every=one.every, period=one.period, span=one.span)
            for one in spec.validation
        ],
        **{name: getattr(spec, name) for name in _SPEC_FIELDS},
    )
    if spec.probe is not None:
        probe = {name: getattr(spec.probe, name) for name in _PROBE_FIELDS}
        message.probe.CopyFrom(common.ProbeSpec(layers=spec.probe.layers, **probe))
    return message


@checked
def spec_from_proto(message: common.RunSpec) -> RunSpec:
    """Decode a run's settings."""
    probe = None
    if message.HasField("probe"):
        fields = {name: getattr(message.probe, name) for name in _PROBE_FIELDS}
        probe = ProbeSpec(layers=tuple(message.probe.layers), **fields)
    fields = {name: getattr(message, name) for name in _SPEC_FIELDS}
    fields["packing"] = fields["packing"] or CONCATENATE
    validation = tuple(
        ValidationSpec(every=one.every, period=one.period, span=one.span)
        for one in message.validation
    )
    return RunSpec(domains=tuple(message.domains), probe=probe, validation=validation, **fields)


def endpoint_to_proto(endpoint: LaneEndpoint) -> common.LaneEndpoint:
    """Encode who serves a lane."""
    return common.LaneEndpoint(
        lane=endpoint.lane, endpoint=endpoint.endpoint, worker_id=endpoint.worker_id
    )


def endpoint_from_proto(message: common.LaneEndpoint) -> LaneEndpoint:
    """Decode who serves a lane."""
    return LaneEndpoint(
        lane=Lane(message.lane), endpoint=message.endpoint, worker_id=message.worker_id
    )


def quarantine_to_proto(quarantine: Quarantine) -> common.Quarantine:
    """Encode what was left out."""
    return common.Quarantine(
        domain=quarantine.domain,
        shard=quarantine.shard,
        sample=quarantine.sample,
        reason=quarantine.reason,
    )


def quarantine_from_proto(message: common.Quarantine) -> Quarantine:
    """Decode what was left out."""
    return Quarantine(
        domain=message.domain, shard=message.shard, sample=message.sample, reason=message.reason
    )


def spec_to_bytes(spec: RunSpec) -> bytes:
    """Encode a run's settings, for a rank to hand on to those that share its rows."""
    return spec_to_proto(spec).SerializeToString()


def spec_from_bytes(data: bytes) -> RunSpec:
    """Decode what `spec_to_bytes` made."""
    return spec_from_proto(common.RunSpec.FromString(data))
