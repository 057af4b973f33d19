"""What a run file must say for a cluster, its paths there, and what a second `up` minds."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.config import RunConfig, parse_run
from deploy.cluster_config import check_same, differences, for_cluster
from deploy.node_actors import address_at_node
from protos.errors import ConfigError


def _run(**changes: object) -> RunConfig:
    return parse_run(
        {
            "run": "r",
            "steps": 10,
            "out": "out",
            "address": "127.0.0.1:7700",
            "data": {
                "index": "index.parquet",
                "vocab_size": 10,
                "eot_id": 0,
                "domains": {"web": {"shards": ["web/*.tar", "s3://bucket/web/*.tar"]}},
            },
            "batch": {"global_sequences": 8, "sequence_length": 4},
            "policy": {"name": "uniform"},
            **changes,
        },
        source="a test",
    )


def test_paths_are_looked_up_from_here_and_urls_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = for_cluster(_run(), workers=None, num_nodes=1)
    assert run.out == tmp_path / "out"
    assert run.data.index == tmp_path / "index.parquet"
    assert run.data.domains["web"].shards == (f"{tmp_path}/web/*.tar", "s3://bucket/web/*.tar")


def test_what_a_cluster_cannot_serve_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="another port at every start"):
        for_cluster(_run(address="127.0.0.1:0"), workers=None, num_nodes=1)
    with pytest.raises(ConfigError, match="gives the page another port"):
        for_cluster(_run(dashboard={"address": "127.0.0.1:0"}), workers=None, num_nodes=1)
    with pytest.raises(ConfigError, match=r"has 3: write address: 0\.0\.0\.0:7700, with security"):
        for_cluster(_run(), workers=None, num_nodes=3)
    out = "/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_1/out"
    with pytest.raises(ConfigError, match="Ray unpacked for this job"):
        for_cluster(_run(out=out), workers=None, num_nodes=1)


def test_the_number_of_workers_stays_within_its_bounds() -> None:
    bounded = _run(workers={"count": 2, "min": 1, "max": 4})
    assert for_cluster(bounded, workers=3, num_nodes=1).workers.count == 3
    with pytest.raises(
        ConfigError, match=r"^--workers 5: count must lie between min = 1 and max = 4, got 5$"
    ):
        for_cluster(bounded, workers=5, num_nodes=1)
    with pytest.raises(ConfigError, match="min and max go together"):
        _run(workers={"min": 1})
    with pytest.raises(ConfigError, match="count must lie between min = 3 and max = 4, got 2"):
        _run(workers={"min": 3, "max": 4})


def test_every_key_that_differs_is_named_with_both_values() -> None:
    mine, theirs = _run(seed=1, cluster={"worker_labels": {"zone": "a"}}), _run(seed=2)
    assert differences(mine, mine) == []
    check_same(mine, mine)
    assert ("seed", "1", "2") in differences(mine, theirs)
    with pytest.raises(ConfigError, match=r"seed: 1 in the file, 2 running; .*zone") as refused:
        check_same(mine, theirs)
    assert "headrace down" in str(refused.value)
    more = for_cluster(_run(), workers=3, num_nodes=1)
    fewer = for_cluster(_run(), workers=2, num_nodes=1)
    with pytest.raises(ConfigError, match="`headrace scale 3` changes that"):
        check_same(more, fewer)


def test_the_controller_serves_at_its_nodes_address() -> None:
    assert address_at_node("0.0.0.0:7700", "10.0.0.5") == "10.0.0.5:7700"
    assert address_at_node("[::]:7700", "fd00::5") == "[fd00::5]:7700"
    assert address_at_node("127.0.0.1:7700", "10.0.0.5") == "127.0.0.1:7700"
    assert address_at_node("10.0.0.5:7700", "10.0.0.5") == "10.0.0.5:7700"
    assert address_at_node("head.example:7700", "10.0.0.5") == "head.example:7700"
    with pytest.raises(ConfigError, match="is not that of the node 10.0.0.5"):
        address_at_node("10.0.0.6:7700", "10.0.0.5")
