"""Spans of decisions for OpenTelemetry, where its environment variables ask for them.

    decision                    from the reports that complete a step to the announcement
      take                      the ranks' reports, added up
      policy                    what the policy, or a learning one and its shadows, make of it
      guard                     what is decided, after operator and guard
      commit                    until the ledger has it on disk

`headrace[otel]` brings the libraries; where to send spans, how many, and as whose is for the
standard variables to say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER, OTEL_TRACES_SAMPLER,
OTEL_SERVICE_NAME, ...). Without them a span costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from typing import Any

logger = logging.getLogger(__name__)

_ASKS = (
    "OTEL_TRACES_EXPORTER",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
)
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_GROUP = "opentelemetry_traces_exporter"
_SERVICE = "headrace-controller"

_tracer: Any = None


def span(name: str, **attributes: int | str) -> AbstractContextManager[object]:
    """Return a block that is a span, below the one around it; attributes get the name `headrace.`.

    Of a process that traces nothing, a block that does nothing.
    """
    if _tracer is None:
        return contextlib.nullcontext()
    named = {f"headrace.{key}": value for key, value in attributes.items()}
    block: AbstractContextManager[object] = _tracer.start_as_current_span(name, attributes=named)
    return block


@contextmanager
def tracing(environment: Mapping[str, str]) -> Iterator[None]:
    """Trace for as long as the block lasts, if the environment asks for it; then send the rest.

    What keeps spans from being sent is a warning: no run ends because of it.
    """
    global _tracer
    provider = None
    if _is_asked_for(environment):
        try:
            provider = _provider(environment)
        except (ImportError, LookupError, ValueError) as error:
            logger.warning("no spans are sent: %s; pip install 'headrace[otel]' brings it", error)
    if provider is None:
        yield
        return
    _tracer = provider.get_tracer("headrace.controller")
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()


def _is_asked_for(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "").lower() == "none":
        return False
    return any(environment.get(name) for name in _ASKS)


def _provider(environment: Mapping[str, str]) -> Any:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = environment.get("OTEL_SERVICE_NAME") or _SERVICE
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    for exporter in (environment.get("OTEL_TRACES_EXPORTER") or "otlp").split(","):
        made = _exporter(exporter.strip(), environment)
        provider.add_span_processor(BatchSpanProcessor(made))
    return provider


def _exporter(name: str, environment: Mapping[str, str]) -> Any:
    """Return the exporter that OTEL_TRACES_EXPORTER names.

    Raises:
        LookupError: none of that name is installed.
    """
    if name == "otlp":
        protocol = next((environment[key] for key in _PROTOCOLS if environment.get(key)), "http")
        name = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    found = list(entry_points(group=_GROUP, name=name))
    if not found:
        raise LookupError(f"there is no exporter of traces named {name}")
    return found[0].load()()
