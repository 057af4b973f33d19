"""Spans of decisions, as a collector receives them over OTLP; and none where nobody asks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from controller.tracing import tracing
from tests.fakes_controller import ODM, STATIC, bench, small_run


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                collector.requests.append(request)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def spans(self) -> list[Any]:
        return [
            each
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for each in scope.spans
        ]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.endpoint)
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    yield made
    made.close()


def decide(folder: Path, policy: dict[str, Any], *, num_steps: int) -> None:
    async def scenario() -> None:
        with bench(small_run(folder, policy=policy)) as made:
            await made.join_all(1)
            for step in range(num_steps):
                await made.report_step(step)

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", [ODM, STATIC], ids=lambda policy: str(policy["name"]))
def test_a_decision_and_its_parts_are_spans(
    tmp_path: Path, collector: Collector, policy: dict[str, Any]
) -> None:
    import os

    with tracing(os.environ):
        decide(tmp_path, policy, num_steps=3)
    spans = collector.spans
    decisions = [each for each in spans if each.name == "decision"]
    assert len(decisions) == 3
    for step, decision in enumerate(decisions):
        held = {each.key: each.value.int_value for each in decision.attributes}
        assert held == {"headrace.step": step, "headrace.generation": 1}
        parts = [each for each in spans if each.parent_span_id == decision.span_id]
        assert {each.name for each in parts} == {"take", "policy", "guard", "commit"}
        for part in parts:
            assert part.trace_id == decision.trace_id
            assert decision.start_time_unix_nano <= part.start_time_unix_nano
            assert part.end_time_unix_nano <= decision.end_time_unix_nano
    named = collector.requests[0].resource_spans[0].resource.attributes
    assert "headrace-controller" in {each.value.string_value for each in named}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
    ],
)
def test_nobody_asks_and_nothing_is_traced(
    tmp_path: Path, collector: Collector, environment: dict[str, str]
) -> None:
    with tracing(environment):
        decide(tmp_path, STATIC, num_steps=1)
    assert collector.requests == []


def test_an_exporter_that_there_is_not_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        tracing({"OTEL_TRACES_EXPORTER": "nonsense"}),
    ):
        decide(tmp_path, STATIC, num_steps=1)
    (record,) = [each for each in caplog.records if each.name == "controller.tracing"]
    assert "there is no exporter of traces named nonsense" in record.message
