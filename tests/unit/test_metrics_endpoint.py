"""The figures for Prometheus: what is documented is exported, guarded as it says, and right."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from controller.config import parse_run, with_metrics
from controller.metrics import Histogram, Metrics, Totals
from controller.metrics_server import MOST_CALLS, serving_metrics
from controller.scrape import METRICS, MOST_WORKERS, families
from loader_workers.figures import FIGURES, Telling
from loader_workers.worker import WorkerStats
from protos.errors import AlreadyServing, ConfigError
from protos.security import Security
from protos.status import RunStatus
from tests.fakes_controller import DOMAINS, ODM, bench, run_document, small_run
from tests.fakes_security import Authority, make_token, write_tokens
from tests.unit.test_terminal import HOSTILE, a_status

ROOT = Path(__file__).resolve().parents[2]
NAMES = {metric.name for metric in METRICS}


def everything(status: RunStatus, metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return each sample by its name and its labels' values, but for the run's."""
    with serving_metrics("127.0.0.1:0", Security(), None, lambda: families(status, metrics)) as url:
        return samples_of(get(url)[1])


def samples_of(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(value for name, value in sample.labels.items() if name != "run")): (
            sample.value
        )
        for family in parse(text)
        for sample in family.samples
    }


def get(
    url: str,
    *,
    token: str | None = None,
    context: ssl.SSLContext | None = None,
    accept: str = "text/plain",
) -> tuple[int, str]:
    headers = {"Accept": accept}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_run_that_trains_is_told_as_it_is(tmp_path: Path) -> None:
    config = small_run(tmp_path, policy=ODM, shadows=[ODM])

    async def scenario() -> tuple[RunStatus, list[Any], Metrics]:
        with bench(config) as made:
            await made.join_all(1)
            for step in range(5):
                await made.report_step(step)
            return await made.service.status(), await made.service.figures(), made.metrics

    status, figures, metrics = asyncio.run(scenario())
    with serving_metrics("127.0.0.1:0", Security(), None, lambda: figures) as url:
        code, text = get(url)
    assert code == 200
    found = samples_of(text)
    assert found["headrace_run_info", ("odm",)] == 1
    assert found["headrace_observed_step", ()] == 4
    assert found["headrace_planned_steps", ()] == 40
    assert found["headrace_tokens_total", ()] == status.tokens > 0
    for index, domain in enumerate(DOMAINS):
        assert found["headrace_mixture_share", (domain,)] == status.mixture.shares[index]
        assert found["headrace_domain_loss_nats", (domain,)] == status.loss[index]
        tokens = found["headrace_domain_tokens_total", (domain,)]
        assert tokens == metrics.domain_tokens[index] > 0
    assert sum(metrics.domain_tokens) == status.tokens
    assert found["headrace_decision_seconds_count", ()] == 5
    assert found["headrace_step_seconds_count", ()] == 5
    assert found["headrace_step_seconds_bucket", ("+Inf",)] == 5
    assert found["headrace_workers", ("alive",)] == 1
    assert found["headrace_shadow_failed", ("odm",)] == 0
    assert found["headrace_ledger_writable", ()] == 1


def test_every_metric_is_exported_with_its_kind_and_labels_and_no_other_is() -> None:
    status = a_status(num_domains=4, num_workers=3)
    metrics = Metrics(4, Totals(), now=lambda: 0.0)
    with serving_metrics("127.0.0.1:0", Security(), None, lambda: families(status, metrics)) as url:
        plain, modern = get(url)[1], get(url, accept="application/openmetrics-text")[1]
    for text, parser in ((plain, parse), (modern, parse_openmetrics)):
        found = {family.name: family for family in parser(text)}
        for metric in METRICS:
            family = found.pop(metric.name.removesuffix("_total"))
            assert family.type == metric.kind
            for sample in family.samples:
                extra = {"le"} if metric.kind == "histogram" else set()
                assert set(sample.labels) - extra == {"run", *metric.labels}
        assert not found
    assert modern.endswith("# EOF\n")


def test_hostile_names_come_back_as_they_were() -> None:
    found = everything(a_status(), Metrics(4, Totals(), now=lambda: 0.0))
    shown = {labels[0] for name, labels in found if name == "headrace_mixture_share"}
    assert shown == set(HOSTILE)


def test_series_stay_few_however_many_workers_come_and_go() -> None:
    status = a_status(num_workers=4 * MOST_WORKERS)
    found = everything(status, Metrics(4, Totals(), now=lambda: 0.0))
    lanes = [labels for name, labels in found if name == "headrace_worker_lanes"]
    assert len(lanes) == MOST_WORKERS
    alive = sum(worker.alive for worker in status.workers)
    assert found["headrace_workers", ("alive",)] == alive
    assert found["headrace_workers", ("lost",)] == len(status.workers) - alive
    assert sum(name == "headrace_worker_silent_seconds" for name, _ in found) == MOST_WORKERS
    gone = replace(
        status,
        workers=tuple(replace(each, alive=False, silent_s=601.0) for each in status.workers),
    )
    found = everything(gone, Metrics(4, Totals(), now=lambda: 0.0))
    assert not [labels for name, labels in found if name == "headrace_worker_lanes"]
    assert not [labels for name, labels in found if name == "headrace_worker_silent_seconds"]


def test_a_worker_that_is_silent_or_was_lost_a_moment_ago_is_named() -> None:
    status = a_status(num_workers=MOST_WORKERS + 3)
    *rest, hung, lost = status.workers
    workers = (*rest, replace(hung, alive=True, silent_s=5.0), replace(lost, silent_s=20.0))
    lost_now = replace(status, workers=(*workers[:-1], replace(workers[-1], alive=False)))
    found = everything(lost_now, Metrics(4, Totals(), now=lambda: 0.0))
    assert found["headrace_worker_silent_seconds", (hung.worker_id,)] == 5
    assert found["headrace_worker_silent_seconds", (lost.worker_id,)] == 20


def test_a_histogram_counts_each_value_once() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.total == 14.0


def test_the_documented_table_is_the_registry() -> None:
    text = (ROOT / "deploy" / "docs" / "metrics.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `headrace_")
    ]
    assert rows == [
        [
            f"`{metric.name}`",
            metric.kind,
            metric.unit or "-",
            ", ".join(f"`{label}`" for label in metric.labels) or "-",
            metric.what,
        ]
        for metric in METRICS
    ]


def test_the_documented_figures_for_ray_are_those_that_workers_tell() -> None:
    text = (ROOT / "deploy" / "docs" / "metrics.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `ray_headrace_")
    ]
    assert rows == [
        [f"`ray_{figure.name}`", figure.kind, figure.unit, figure.what] for figure in FIGURES
    ]


class Recorded:
    """What Ray's counters and gauges would hold."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        assert value > 0
        self.values[name] = self.values.get(name, 0.0) + value

    def set(self, name: str, value: float) -> None:
        self.values[name] = value


def test_a_workers_counters_grow_by_what_is_new_and_its_gauges_stand() -> None:
    stats = WorkerStats(
        endpoint="127.0.0.1:1",
        is_ready=True,
        open_streams=2,
        sequences_served=10,
        stall_s=1.5,
        degraded_steps=0,
        cache_bytes=100,
        num_quarantined=1,
        error="",
        has_left=False,
    )
    now, recorded = [stats], Recorded()
    telling = Telling(lambda: now[0], recorded, stop=threading.Event())
    telling.tell()
    now[0] = replace(stats, sequences_served=25, cache_bytes=40, open_streams=0)
    told = telling.tell()
    assert recorded.values == {
        name: value for name, value in told.items() if value or name in ("headrace_loader_streams",)
    }
    assert recorded.values["headrace_loader_sequences_total"] == 25
    assert recorded.values["headrace_loader_cache_bytes"] == 40
    assert recorded.values["headrace_loader_stall_seconds_total"] == 1.5


def test_every_expression_of_the_dashboard_names_exported_metrics() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "headrace.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [each["query"]["query"] for each in dashboard["templating"]["list"][1:]]
    assert len(expressions) > 20
    histograms = {metric.name for metric in METRICS if metric.kind == "histogram"}
    exported = NAMES | {
        f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")
    }
    labels = {metric.name: {"run", *metric.labels} for metric in METRICS}
    used = set()
    for expression in expressions:
        names = re.findall(r"\bheadrace_\w+", expression)
        assert names, expression
        assert set(names) <= exported, expression
        used |= set(names)
        for name, inside in re.findall(r"\b(headrace_\w+)\{([^}]*)\}", expression):
            plain = re.sub(r"_(bucket|sum|count)$", "", name)
            known = labels[plain if plain in histograms else name]
            assert set(re.findall(r"(\w+)[=!]~?=?\"", inside)) <= known, expression
    assert len(used) > 20
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_token_is_asked_for_where_there_is_one(tmp_path: Path) -> None:
    token = make_token()
    write_tokens(tmp_path / "metrics", token)
    with serving_metrics("127.0.0.1:0", Security(), tmp_path / "metrics", lambda: []) as url:
        assert get(url, token=token)[0] == 200
        for wrong in (None, "", "x" * 64, token[:-1], f"{token}\u00e9"):
            code, text = get(url, token=wrong)
            assert code == 401
            assert "token" in text
        other = url.removesuffix("/metrics")
        assert get(f"{other}/", token=token)[0] == 404
        assert get(f"{other}/metrics/../secrets", token=token)[0] == 404


def test_tls_keeps_out_who_does_not_belong_and_certificates_are_renewed(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("controller")
    mine, my_key = authority.issue("prometheus")
    security = Security(cert=cert, key=key, client_ca=authority.pem)
    with serving_metrics("127.0.0.1:0", security, None, lambda: []) as url:
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=authority.pem)
        context.load_cert_chain(mine, my_key)
        assert get(url, context=context)[0] == 200
        stranger = ssl.create_default_context(cafile=authority.pem)
        with pytest.raises((urllib.error.URLError, OSError)):
            get(url, context=stranger)
        assert get(url, context=context)[0] == 200
        other = Authority(tmp_path / "new", "new")
        for new, old in zip(other.issue("controller"), (cert, key), strict=True):
            new.replace(old)
        renewed = ssl.create_default_context(cafile=other.pem)
        renewed.load_cert_chain(mine, my_key)
        assert get(url, context=renewed)[0] == 200


def test_callers_that_say_nothing_keep_no_other_out_for_long() -> None:
    import socket

    with serving_metrics("127.0.0.1:0", Security(), None, lambda: []) as url:
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MOST_CALLS)]
        # Those beyond the first few are turned away at once, so that they hold nothing.
        for each in silent[MOST_CALLS:]:
            each.settimeout(30)
            assert each.recv(1) == b""
        silent[0].close()
        eventually(lambda: get(url)[0] == 200)
        for each in silent:
            each.close()


def eventually(condition: Callable[[], bool], *, tries: int = 300) -> None:
    pause = threading.Event()
    for _ in range(tries):
        try:
            if condition():
                return
        except OSError:
            pass
        pause.wait(0.1)
    raise AssertionError("it never came to that")


def test_a_busy_controller_is_said_to_be() -> None:
    def busy() -> list[Any]:
        raise TimeoutError

    with serving_metrics("127.0.0.1:0", Security(), None, busy) as url:
        assert get(url)[0] == 503


def test_an_address_beyond_loopback_needs_tls_and_a_token(tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            parse_run(run_document(tmp_path, **changes), source="run.yaml")
        return str(caught.value)

    assert "metrics at 0.0.0.0:9464 would show the run" in refused(
        metrics={"address": "0.0.0.0:9464"}
    )
    tls = {"cert": "c.pem", "key": "k.pem"}
    assert "metrics.token_file" in refused(
        metrics={"address": "0.0.0.0:9464"}, security={"tls": tls}
    )
    assert "HOST:PORT" in refused(metrics={"address": "nowhere"})
    fine = parse_run(
        run_document(
            tmp_path,
            metrics={"address": "0.0.0.0:9464", "token_file": "t"},
            security={"tls": tls},
        ),
        source="run.yaml",
    )
    assert fine.metrics.token_file == Path("t").absolute()
    small = small_run(tmp_path)
    assert with_metrics(small, None) is small
    with pytest.raises(ConfigError, match="--metrics: .*would show the run"):
        with_metrics(small, "0.0.0.0:1")


def test_a_port_that_is_taken_is_said() -> None:
    with serving_metrics("127.0.0.1:0", Security(), None, lambda: []) as url:
        port = url.rsplit(":", 1)[1].split("/")[0]
        with (
            pytest.raises(AlreadyServing, match=r"metrics\.address"),
            serving_metrics(f"127.0.0.1:{port}", Security(), None, lambda: []),
        ):
            pass


@contextmanager
def controller_process(
    run_file: Path, *options: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "controller", str(run_file), "--verbose", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.search(r"metrics url=(\S+)", line)
            if found:
                yield found[1], process
                return
        raise AssertionError("the controller said nothing of metrics")
    finally:
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        process.stderr.close()
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_controller_serves_its_figures(tmp_path: Path) -> None:
    small_run(tmp_path)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_document(tmp_path), sort_keys=False))
    with controller_process(run_file, "--metrics", "127.0.0.1:0") as (url, _):
        found = samples_of(get(url)[1])
    assert found["headrace_observed_step", ()] == -1
    shares = [found["headrace_mixture_share", (domain,)] for domain in DOMAINS]
    assert np.isclose(sum(shares), 1)
