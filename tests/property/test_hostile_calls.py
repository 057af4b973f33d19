"""Calls that nobody should make: refused with the right status, and nothing has changed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos.client import AdminClient, ControlClient
from protos.errors import InvalidMessage, Rejected, StaleGeneration, UnknownDomain
from protos.server import serving_data
from protos.types import Step, StepReport
from tests.fakes_controller import ACODM, ODM, bench, make_report, small_run
from tests.fakes_security import Method, call, every_method
from tests.fakes_served import Served, served
from tests.fakes_stream import whole_stream
from tests.fakes_trainer import wait_until
from tests.integration.test_handlers_twice import REQUESTS
from tests.unit.test_loader_service import serving_source

METHODS = [method for method in every_method() if method.path in REQUESTS]
STREAM = "/headrace.v1.Data/StreamBatches"

REFUSALS = {
    grpc.StatusCode[name]
    for name in (
        *("INVALID_ARGUMENT", "FAILED_PRECONDITION", "ABORTED", "DEADLINE_EXCEEDED"),
        *("UNAVAILABLE", "RESOURCE_EXHAUSTED"),
    )
}
"""What a call that cannot be done may end with. INTERNAL and UNKNOWN mean that we are broken."""

AGAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
"""Says that the same call may be made again."""

FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

INTEGERS = st.one_of(
    st.sampled_from([0, 1, 2, 7, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]),
    st.integers(0, 20),
)
FLOATS = st.one_of(
    st.sampled_from([0.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan]), st.floats()
)
STRINGS = st.one_of(st.sampled_from(["", "web", "small", "../../x", "\0", "x" * 5000]), st.text())


def value_of(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Draw a value that the field's type can hold, and hardly any run means."""
    kinds = FieldDescriptor
    match field.cpp_type:
        case kinds.CPPTYPE_BOOL:
            return st.booleans()
        case kinds.CPPTYPE_DOUBLE | kinds.CPPTYPE_FLOAT:
            return FLOATS
        case kinds.CPPTYPE_UINT32:
            return INTEGERS.map(lambda value: value % (1 << 32))
        case kinds.CPPTYPE_INT32:
            return INTEGERS.map(lambda value: value % (1 << 31))
        case kinds.CPPTYPE_INT64:
            return INTEGERS.map(lambda value: value - (1 << 63) if value >= 1 << 63 else value)
        case kinds.CPPTYPE_UINT64:
            return INTEGERS
    return st.binary(max_size=80) if field.type == kinds.TYPE_BYTES else STRINGS


def set_something(message: Message, data: st.DataObject) -> None:
    """Set a field, somewhere in the message, to something."""
    fields: list[Any] = [field for field in message.DESCRIPTOR.fields if not _is_map(field)]
    if not fields:
        return
    field = data.draw(st.sampled_from(fields), label="field")
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        inner = getattr(message, field.name)
        set_something(inner.add() if field.is_repeated else inner, data)
    elif field.is_repeated:
        del getattr(message, field.name)[:]
        drawn = data.draw(st.lists(value_of(field), max_size=5), label=field.name)
        getattr(message, field.name).extend(drawn)
    else:
        setattr(message, field.name, data.draw(value_of(field), label=field.name))


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def changed_bytes(whole: bytes, data: st.DataObject) -> bytes:
    """Cut, put in or overwrite a few bytes."""
    begin = data.draw(st.integers(0, len(whole)), label="begin")
    end = data.draw(st.integers(begin, min(begin + 8, len(whole))), label="end")
    return whole[:begin] + data.draw(st.binary(max_size=8), label="new") + whole[end:]


def refuse_or_do(run: Served, channel: grpc.Channel, path: str, *messages: bytes) -> None:
    """Make a call: it is done, or it is refused and nothing has changed."""
    service = run.bench.service
    # Workers that enlisted have left, and joins that gave up have ended.
    wait_until(lambda: not service._streams and not service._joining._starting)
    before = run.digest()
    code, sentence = call(channel, path, (), *messages, timeout_s=1.0)
    if code is not grpc.StatusCode.OK:
        assert code in REFUSALS, (code, sentence)
        if path == "/headrace.v1.Control/ReportSteps":
            return  # the reports before the one that is refused have been taken in, as promised
        if path == "/headrace.v1.Control/Join" and code in AGAIN:
            return  # it waits no longer, but what it was there for may have begun
        assert run.digest() == before, (code, sentence)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path)
def test_no_bytes_break_the_controller_or_change_it_unless_they_are_a_request(
    method: Method, tmp_path: Path
) -> None:
    with served(tmp_path, policy=ACODM) as run, grpc.insecure_channel(run.address) as channel:
        run.do(run.bench.join_all(1))
        for step in range(4):
            run.do(run.bench.report_step(step))
        good = REQUESTS[method.path](run)

        @FEW
        @given(data=st.data())
        def attack(data: st.DataObject) -> None:
            kind = data.draw(st.sampled_from(["random", "bytes", "fields"]), label="kind")
            message = type(good)()
            message.CopyFrom(good)
            if kind == "fields":
                for _ in range(data.draw(st.integers(1, 3), label="fields")):
                    set_something(message, data)
            if hasattr(message, "timeout_s"):
                message.timeout_s = min(message.timeout_s, 0.01)  # else a Join may wait, as it asks
            raw = message.SerializeToString()
            if kind == "bytes":
                raw = changed_bytes(raw, data)
            elif kind == "random":
                raw = data.draw(st.binary(max_size=100), label="raw")
            refuse_or_do(run, channel, method.path, raw)

        attack()
        # It is as well as before.
        assert call(channel, "/headrace.v1.Admin/Status")[0] is grpc.StatusCode.OK


def test_no_bytes_break_a_worker(tmp_path: Path) -> None:
    with (
        serving_source(tmp_path) as (spec, service),
        serving_data(service, address="127.0.0.1:0") as endpoint,
        grpc.insecure_channel(endpoint) as channel,
    ):

        @FEW
        @given(messages=st.lists(st.binary(max_size=60), min_size=1, max_size=3))
        def attack(messages: list[bytes]) -> None:
            code, sentence = call(channel, STREAM, (), *messages, timeout_s=1.0)
            assert code in REFUSALS | {grpc.StatusCode.OK}, (code, sentence)

        attack()
        with whole_stream(spec, endpoint) as stream:
            assert [batch.step for batch in stream.take(3)] == [0, 1, 2]


def _nan(report: StepReport) -> Any:
    return np.full_like(report.loss_sum, math.nan)


WRONG_REPORTS: dict[str, tuple[type[Rejected], dict[str, Any]]] = {
    "loss NaN": (InvalidMessage, {"loss_sum": np.array([math.nan, 1, 1])}),
    "loss infinite": (InvalidMessage, {"loss_sum": np.array([math.inf, 1, 1])}),
    "loss minus infinite": (InvalidMessage, {"loss_sum": np.array([-math.inf, 1, 1])}),
    "loss negative": (InvalidMessage, {"loss_sum": np.array([-1.0, 1, 1])}),
    "one domain too few": (InvalidMessage, {"loss_sum": np.ones(2)}),
    "one domain too many": (InvalidMessage, {"sequences": np.array([1, 1, 1, 1])}),
    "no domains": (InvalidMessage, {"tokens": np.array([], np.int64)}),
    "sequences that wrap around": (InvalidMessage, {"sequences": np.array([1 << 62, 1 << 62, 0])}),
    "more tokens than fit": (InvalidMessage, {"tokens": np.array([1 << 60, 0, 0])}),
    "alignment NaN": (InvalidMessage, {"alignment_part": np.full((3, 3), math.nan)}),
    "alignment of another shape": (InvalidMessage, {"alignment_part": np.ones((2, 2))}),
    "share above one": (InvalidMessage, {"alignment_share": 1.5}),
    "share NaN": (InvalidMessage, {"alignment_share": math.nan}),
    "norm infinite": (InvalidMessage, {"weight_norms": (math.inf, 1.0)}),
    "time negative": (InvalidMessage, {"step_s": -1.0}),
    "time NaN": (InvalidMessage, {"data_wait_s": math.nan}),
    "a future step": (InvalidMessage, {"step": 1000}),
    "the last step there is": (InvalidMessage, {"step": (1 << 63) - 1}),
    "a rank that is not": (InvalidMessage, {"rank": 9}),
    "another's lane": (InvalidMessage, {"cursors": {99: np.zeros((3, 3), np.uint32)}}),
    "an old generation": (StaleGeneration, {"generation": 0}),
    "a generation to come": (StaleGeneration, {"generation": 99}),
}


@pytest.mark.fault_row(29, "reports that cannot be right")
def test_wrong_numbers_are_refused_with_the_right_status_and_change_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    with served(tmp_path, policy=ACODM) as run:
        run.do(run.bench.join_all(1))
        for step in range(4):
            run.do(run.bench.report_step(step))
        before = run.digest()
        control, admin = ControlClient(run.address), AdminClient(run.address)
        good = make_report(run.spec, step=4)
        for name, (error, changes) in WRONG_REPORTS.items():
            fields = {slot: getattr(good, slot) for slot in StepReport.__slots__} | changes
            with pytest.raises(error):
                control.report(StepReport(**fields))
            assert run.digest() == before, name
        for name, shares in {
            "unknown": {"wbe": 1.0},
            "very long": {"w" * 100_000: 1.0},
            "NaN": {"web": math.nan},
            "infinite": {"web": math.inf},
            "negative": {"web": -1.0},
            "nothing": {},
            "all zero": {"web": 0.0},
        }.items():
            with pytest.raises((InvalidMessage, UnknownDomain)):
                admin.set_mixture(shares)
            assert run.digest() == before, name
        assert control.report(good).counted
        record_injections(len(WRONG_REPORTS), "state hashed before and after each")
        control.close()
        admin.close()


Poison = Callable[[dict[str, Any]], dict[str, Any]]

POISONS: dict[str, dict[str, Poison]] = {
    "odm": {
        "losses a million times too high": lambda fields: {"loss_sum": fields["loss_sum"] * 1e6},
        "losses as high as numbers go": lambda fields: {"loss_sum": np.full(3, 1e307)},
        "one domain's loss gone": lambda fields: {"loss_sum": fields["loss_sum"] * (1, 1, 0)},
    },
    "acodm": {
        "one domain praised": lambda fields: {"alignment_part": np.diag([1e12, 0.0, 0.0])},
        "all domains at odds": lambda fields: {"alignment_part": np.full((3, 3), -1e12)},
    },
}

CAP = 0.02
NUM_RANKS = 8
NUM_STEPS = 12


async def _mixtures(
    folder: Path, policy: dict[str, Any], poison: Poison, *, cap: float
) -> np.ndarray:
    """Train with one of 8 ranks poisoned; return the shares of every step."""
    guard = {"max_change": cap, "min_share": 0.05}
    batch = {"global_sequences": 3 * NUM_RANKS}  # a sequence of each domain for each rank
    config = small_run(folder, policy=policy, guard=guard, batch=batch)
    with bench(config) as made:
        await made.join_all(NUM_RANKS)
        for step in range(NUM_STEPS):
            version = made.state.book.plan_at(Step(step)).version
            for rank in range(NUM_RANKS):
                report = make_report(
                    made.spec, rank=rank, world_size=NUM_RANKS, step=step, plan_version=version
                )
                fields = {slot: getattr(report, slot) for slot in StepReport.__slots__}
                if rank == 3:
                    fields |= poison(fields)
                await made.service.report(StepReport(**fields))
            await made.settle()
        return np.array(
            [made.state.book.plan_at(step).mixture.shares for step in map(Step, range(NUM_STEPS))]
        )


@pytest.mark.fault_row(30, "poisoned but finite statistics of 1 of 8 ranks")
@pytest.mark.parametrize("policy", [ODM, ACODM], ids=lambda policy: policy["name"])
def test_one_poisoned_rank_of_eight_moves_no_share_by_more_than_the_cap_a_step(
    policy: dict[str, Any], tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    freely = 0.0
    for number, (name, poison) in enumerate(POISONS[policy["name"]].items()):
        shares = asyncio.run(_mixtures(tmp_path / f"{number}", policy, poison, cap=CAP))
        assert np.isfinite(shares).all()
        assert np.abs(np.diff(shares, axis=0)).max() <= CAP + 1e-9, name
        assert shares.min() >= 0.05 - 1e-9, name
        uncapped = asyncio.run(_mixtures(tmp_path / f"{number}-free", policy, poison, cap=1.0))
        freely = max(freely, np.abs(np.diff(uncapped, axis=0)).max())
    # It is the cap that held, not a policy that moves little.
    assert freely > CAP
    num_reports = len(POISONS[policy["name"]]) * NUM_STEPS
    record_injections(num_reports, f"change at most {CAP}, without the cap {freely:.2f}")
