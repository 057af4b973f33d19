"""Both services between real gRPC ends: answers, streams, errors as themselves, one port each."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from protos.client import AdminClient, ControlClient, DataClient, healthy
from protos.errors import (
    AlreadyServing,
    ControllerUnreachable,
    Disagreement,
    InvalidMessage,
    StaleGeneration,
    UnknownDomain,
    WorkerUnreachable,
)
from protos.server import serving_data
from protos.types import (
    Beat,
    Credit,
    Generation,
    JoinRequest,
    OpenStream,
    Rank,
    Step,
    WorkerBeat,
)
from tests.fakes_services import TABLE, ScriptedController, ScriptedWorker, serving
from tests.property.test_codec import (
    BEAT,
    JOIN,
    OPENING,
    PLAN,
    REPORT,
    SPEC,
    STATUS,
)


def test_unary_calls_answer_in_our_types() -> None:
    controller = ScriptedController()
    with serving(controller) as address:
        client, admin = ControlClient(address), AdminClient(address)
        assert client.join(JOIN).spec == SPEC
        assert client.locate(Generation(1)) == TABLE
        assert client.locate(Generation(1), unreachable="127.0.0.1:9") == TABLE
        assert client.report(REPORT).sealed_through == 5
        later = dataclasses.replace(REPORT, step=Step(REPORT.step + 1))
        assert client.report_steps([REPORT, later]).sealed_through == 5
        assert [report.step for report in controller.reports[1:]] == [REPORT.step, later.step]
        with pytest.raises(InvalidMessage, match="at least one report"):
            client.report_steps([])
        assert admin.status() == STATUS
        assert admin.snapshot_policy() == "/snapshots/7"
        admin.freeze()
        admin.resume()
        admin.drain()
        admin.scale(3)
        assert controller.wanted_workers == 3
        assert controller.unreachable == ["", "127.0.0.1:9"]
        assert healthy(address, timeout_s=5)
        client.close()
        client.close()
        admin.close()


def test_an_error_comes_back_as_itself_with_its_sentence() -> None:
    controller = ScriptedController()
    with serving(controller) as address:
        client, admin = ControlClient(address), AdminClient(address)
        first = JoinRequest(rank=Rank(0), world_size=2, attempt_id="a")
        with pytest.raises(Disagreement, match="^rank 0 says 8, rank 1 says 4$"):
            client.join(first)
        with pytest.raises(UnknownDomain, match="no domain 'x'"):
            admin.set_mixture({"x": 1.0})
        controller.fail_with = InvalidMessage("rank 1, step 9: loss_sum[0] is nan")
        with pytest.raises(InvalidMessage, match="step 9"):
            client.report(REPORT)
        client.close()
        admin.close()


def test_an_unexpected_error_says_nothing_of_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    controller = ScriptedController()
    controller.fail_with = RuntimeError("secret")
    with serving(controller) as address:
        client = ControlClient(address)
        with pytest.raises(ControllerUnreachable) as raised:
            client.report(REPORT)
        assert "secret" not in str(raised.value)
        client.close()
    assert "secret" in caplog.text


def test_plans_stream_until_cancelled() -> None:
    controller = ScriptedController()
    with serving(controller) as address:
        client = ControlClient(address)
        stream = client.watch_plans("w")
        assert next(stream).plans == (PLAN,)
        stream.cancel()
        assert list(stream) == []
        assert controller.watchers_gone.wait(10)
        client.close()


def test_a_worker_enlists_and_beats() -> None:
    controller = ScriptedController()
    with serving(controller) as address:
        client = ControlClient(address)
        done = threading.Event()

        def beats() -> Iterator[WorkerBeat]:
            yield BEAT
            done.wait(10)

        stream = client.enlist(beats())
        assert next(stream) == SPEC
        assert next(stream) == Beat()
        assert controller.beats == [BEAT]
        done.set()
        assert list(stream) == []
        client.close()


def test_nobody_there_is_said_with_the_address() -> None:
    client = ControlClient("127.0.0.1:1")
    with pytest.raises(ControllerUnreachable, match="127.0.0.1:1"):
        client.report(REPORT, timeout_s=2)
    client.close()


def test_a_second_server_on_the_port_is_refused() -> None:
    with (
        serving(ScriptedController()) as address,
        pytest.raises(AlreadyServing, match=address),
        serving(ScriptedController(), address),
    ):
        pass


def test_batches_stream_as_far_as_the_credits_go_and_the_worker_sees_the_rank_leave() -> None:
    worker = ScriptedWorker()
    with serving_data(worker, address="127.0.0.1:0") as endpoint:
        client = DataClient(endpoint)
        more, done = threading.Event(), threading.Event()

        def credits() -> Iterator[Credit]:
            more.wait(10)
            yield Credit(steps=2)
            done.wait(10)

        stream = client.stream_batches(
            OPENING, credits(), token_dtype=np.dtype("<u4"), sequence_length=3
        )
        first = [next(stream) for _ in range(OPENING.credits)]
        more.set()
        assert len([*first, next(stream), next(stream)]) == OPENING.credits + 2
        stream.cancel()
        assert worker.rank_left.wait(10)
        done.set()
        assert healthy(endpoint, timeout_s=5)
        client.close()


def test_a_worker_refuses_with_its_own_error() -> None:
    opening = OpenStream(
        run_id="r",
        generation=Generation(6),
        rank=Rank(0),
        from_step=OPENING.from_step,
        first_slot=0,
        end_slot=1,
        cursors={},
        cursor_steps={},
        credits=1,
    )
    with serving_data(ScriptedWorker(), address="127.0.0.1:0") as endpoint:
        client = DataClient(endpoint)
        stream = client.stream_batches(
            opening, iter(()), token_dtype=np.dtype("<u4"), sequence_length=3
        )
        with pytest.raises(StaleGeneration, match="generation 6"):
            next(stream)
        client.close()
    with pytest.raises(WorkerUnreachable):
        next(
            DataClient(endpoint).stream_batches(
                opening, iter(()), token_dtype=np.dtype("<u4"), sequence_length=3
            )
        )
