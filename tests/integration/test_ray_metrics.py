"""Loader workers' figures at the metrics endpoint of their node's Ray: `make test-ray-metrics`."""

from __future__ import annotations

import importlib.util
import json
import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes_consumer import ConsumedRun, write_corpus, write_run
from tests.faults.processes import free_address
from tests.harness_runs import ROOT, wait_until
from tests.ray_clusters import ray_cluster, start_head

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

NUM_STEPS = 10
PREFIX = "ray_headrace_loader_"
GROWS_ONLY_WHERE_SOMETHING_IS_WRONG = {
    f"{PREFIX}degraded_steps_total",
    f"{PREFIX}stall_seconds_total",
}


def _scraped(address: str) -> dict[str, dict[str, float]]:
    """Return our figures at an endpoint: name -> worker -> value."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                assert sample.labels["run"] == "consumed"
                found.setdefault(sample.name, {})[sample.labels["worker"]] = sample.value
    return found


def test_a_workers_figures_are_where_the_guide_says(tmp_path: Path) -> None:
    if importlib.util.find_spec("opencensus") is None:
        pytest.skip("Ray's metrics endpoint needs more than is installed: `make test-ray-metrics`")
    named = set(re.findall(rf"`({PREFIX}\w+)`", (ROOT / "deploy/docs/metrics.md").read_text()))
    assert len(named) == 6
    run_file = write_run(tmp_path / "out", write_corpus(tmp_path / "data"), address=free_address())
    endpoint = free_address()
    with ray_cluster(free_address(), RAY_metrics_report_interval_ms="1000") as cluster:
        start_head(cluster, "--metrics-export-port", endpoint.rpartition(":")[2])
        up = cluster.command("up", str(run_file), "--detach", "--json")
        assert up.returncode == 0, up.stderr
        run = ConsumedRun(tmp_path / "out", json.loads(up.stdout)["address"], drain_s=5.0)
        run.consume(1, until=NUM_STEPS)

        figures: dict[str, dict[str, float]] = {}

        def is_told() -> bool:
            figures.update(_scraped(endpoint))
            served = sum(figures.get(f"{PREFIX}sequences_total", {}).values())
            are_all = figures.keys() >= named - GROWS_ONLY_WHERE_SOMETHING_IS_WRONG
            return are_all and served >= NUM_STEPS * 20

        try:
            wait_until(is_told, timeout_s=60, what="the workers' figures at Ray's endpoint")
        except AssertionError as error:
            raise AssertionError(f"{error}; there are {figures}") from None
        assert figures.keys() <= named
        assert figures[f"{PREFIX}streams"].keys() == {"worker-0", "worker-1"}
        assert cluster.command("down", "consumed").returncode == 0
