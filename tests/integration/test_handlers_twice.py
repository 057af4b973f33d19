"""Every RPC made twice with one request: the second changes nothing and is answered the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from loader_workers.service import LoaderService
from protos import codec
from protos.server import serving_data
from protos.wire import admin_pb2, control_pb2
from tests.fakes_controller import ACODM, join_request, make_beat, make_report, resume_at
from tests.fakes_security import Method, every_method
from tests.fakes_served import Served, served
from tests.fakes_stream import whole_stream
from tests.unit.test_loader_service import serving_source

Request = Callable[[Served], Any]


def _scale(run: Served) -> Any:
    run.bench.workers.beat(make_beat(managed=True))  # else nobody could obey
    return admin_pb2.ScaleRequest(workers=3)


REQUESTS: dict[str, Request] = {
    "/headrace.v1.Control/Join": lambda run: codec.join_request_to_proto(
        join_request(0, 1, attempt="again", resume=resume_at(3, run.spec))
    ),
    "/headrace.v1.Control/Locate": lambda run: control_pb2.LocateRequest(generation=1),
    "/headrace.v1.Control/Report": lambda run: codec.report_to_proto(
        make_report(run.spec, generation=1, world_size=2, step=4)
    ),
    "/headrace.v1.Control/ReportSteps": lambda run: control_pb2.ReportStepsRequest(
        reports=[codec.report_to_proto(make_report(run.spec, generation=1, world_size=2, step=4))]
    ),
    "/headrace.v1.Control/WatchPlans": lambda run: control_pb2.WatchPlansRequest(worker_id="w"),
    "/headrace.v1.Control/Enlist": lambda run: codec.worker_beat_to_proto(make_beat()),
    "/headrace.v1.Admin/Status": lambda run: admin_pb2.StatusRequest(),
    "/headrace.v1.Admin/SetMixture": lambda run: admin_pb2.SetMixtureRequest(shares={"web": 1}),
    "/headrace.v1.Admin/Freeze": lambda run: admin_pb2.FreezeRequest(),
    "/headrace.v1.Admin/Resume": lambda run: admin_pb2.ResumeRequest(),
    "/headrace.v1.Admin/SnapshotPolicy": lambda run: admin_pb2.SnapshotPolicyRequest(),
    "/headrace.v1.Admin/Scale": _scale,
    "/headrace.v1.Admin/Drain": lambda run: admin_pb2.DrainRequest(),
}

CONTROLLER_METHODS = [
    method
    for method in every_method()
    if method.service in ("headrace.v1.Control", "headrace.v1.Admin")
]

CHANGING = {"Join", "Report", "ReportSteps", "SetMixture", "Freeze", "Scale", "Drain"}
"""What the first call must have changed something by; the others read, or undo nothing here."""


class Caller:
    """Makes calls of any kind; their streams stay open until the end."""

    def __init__(self, channel: grpc.Channel, stack: ExitStack) -> None:
        self._channel = channel
        self._over = threading.Event()
        self._stack = stack
        stack.callback(self._over.set)

    def ask(self, method: Method, request: Any) -> bytes:
        """Return the first message of the answer."""
        stream: Any = self._channel.stream_stream(method.path)
        answers = stream(self._requests(method, request), timeout=60)
        self._stack.callback(answers.cancel)
        answer: bytes = next(answers)
        return answer

    def _requests(self, method: Method, request: Any) -> Iterator[bytes]:
        yield request.SerializeToString()
        if method.name == "Enlist":  # a worker whose beats end is lost
            self._over.wait(60)


def steady(method: Method, answer: bytes) -> Any:
    """Return what must be the same of two answers."""
    if method.name in ("Report", "ReportSteps"):
        told = control_pb2.ReportResponse.FromString(answer)
        # Says of the second report that it was known already: that is what it is for.
        told.ClearField("counted")
        return told
    if method.name == "Status":
        status = admin_pb2.StatusResponse.FromString(answer)
        status.ClearField("tokens_per_s")  # by the clock
        return str(status)
    return answer


def test_there_is_a_request_for_every_method() -> None:
    assert {method.path for method in CONTROLLER_METHODS} == set(REQUESTS)


@pytest.mark.parametrize("method", CONTROLLER_METHODS, ids=lambda method: method.path)
def test_the_second_call_changes_nothing_and_is_answered_as_the_first(
    method: Method, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        run = stack.enter_context(served(tmp_path, policy=ACODM))
        caller = Caller(stack.enter_context(grpc.insecure_channel(run.address)), stack)
        run.do(run.bench.join_all(2))
        for step in range(4):
            run.do(run.bench.report_step(step, world_size=2))
        request = REQUESTS[method.path](run)
        before = settled_digest(run)
        first = caller.ask(method, request)
        after_first = settled_digest(run)
        assert (after_first != before) is (method.name in CHANGING)
        second = caller.ask(method, request)
        assert settled_digest(run) == after_first
        assert steady(method, second) == steady(method, first)


def settled_digest(run: Served) -> str:
    """Let the controller do all that follows from what it was asked, then return its digest."""
    run.do(run.bench.settle())
    run.do(run.bench.loop.finish_saving())
    return run.digest()


def test_a_stream_of_batches_that_is_opened_twice_brings_the_same_twice(tmp_path: Path) -> None:
    with serving_source(tmp_path) as (spec, service):
        assert isinstance(service, LoaderService)
        with serving_data(service, address="127.0.0.1:0") as endpoint:
            taken = []
            for _ in range(2):
                with whole_stream(spec, endpoint) as stream:
                    taken.append([_content(batch) for batch in stream.take(5)])
            assert taken[0] == taken[1]
            assert len(taken[0]) == 5


def _content(batch: Any) -> list[Any]:
    lanes = [
        (lane.lane, lane.tokens.tobytes(), lane.domain_ids.tobytes(), lane.cursor_after.tobytes())
        for lane in batch.lanes
    ]
    return [batch.step, batch.plan_version, batch.degraded, lanes]
