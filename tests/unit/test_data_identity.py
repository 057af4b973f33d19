"""A run's data is known by what it holds, not by where it lies."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind
from protos.dataset_index import DatasetIndex
from protos.errors import ConfigError, Disagreement
from protos.spec import RunSpec
from protos.types import Resume, Step
from tests.fakes_controller import bench, places_after, resume_at, small_run, write_index


def _moved(index: DatasetIndex, folder: str) -> DatasetIndex:
    return DatasetIndex(
        replace(shard, url=f"{folder}/{shard.url}")
        for domain in index.domains
        for shard in index.shards(domain)
    )


def _hash_of_before(spec: RunSpec, names: str) -> str:
    values = {name: getattr(spec, name) for name in names.split()}
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_FIRST = (
    "seed domains lanes global_sequences sequence_length window_samples interleave eot_id "
    "text_field index_sha256 tokenizer_sha256"
)
"""What was hashed before there was more than one packing."""


def test_moved_shards_are_the_same_data_and_changed_ones_are_not(tmp_path: Path) -> None:
    index = write_index(tmp_path / "index.parquet")
    moved = _moved(index, "s3://bucket/elsewhere")
    assert moved.sha256 != index.sha256
    assert moved.data_sha256 == index.data_sha256
    first, *others = [shard for domain in index.domains for shard in index.shards(domain)]
    for changed in (
        replace(first, sha256="1" * 64),
        replace(first, num_samples=first.num_samples - 1),
        replace(first, domain="webb"),
    ):
        assert DatasetIndex([changed, *others]).data_sha256 != index.data_sha256
    twin = replace(first, url="z.tar", sha256="2" * 64)
    assert (
        DatasetIndex([first, twin, *others]).data_sha256
        != DatasetIndex([twin, first, *others]).data_sha256
    )


def test_a_run_whose_data_has_moved_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        with bench(config) as controller:
            await controller.join_all(1)
            await controller.report_step(0)
            cursors = places_after(0, controller.spec)
            resume = resume_at(1, controller.spec, cursors=cursors)
        index = DatasetIndex.from_parquet(config.data.index.read_bytes())
        config.data.index.write_bytes(_moved(index, "/mnt/new").to_parquet())
        with bench(config) as controller:
            assert (await controller.join_all(1, attempt="b", resume=resume)).first_step == 1
        changed = replace(index.shards("web")[0], sha256="1" * 64)
        others = [shard for domain in index.domains[1:] for shard in index.shards(domain)]
        config.data.index.write_bytes(DatasetIndex([changed, *others]).to_parquet())
        with pytest.raises(ConfigError, match="belongs to another run"), bench(config):
            pass

    asyncio.run(scenario())


@pytest.mark.parametrize("names", [_FIRST, f"{_FIRST} packing"])
def test_a_ledger_and_a_checkpoint_of_before_are_taken_with_their_own_index(
    tmp_path: Path, names: str
) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        with bench(config) as controller:
            before = _hash_of_before(controller.spec, names)
        with Ledger(config.ledger_path) as ledger:
            row = ledger.newest(Kind.RUN)
            assert row is not None
            body = {**row.body, "order_sha256": before}
            ledger.commit([Entry(kind=Kind.RUN, step=-1, body=body)])
        resume = Resume(order_sha256=before, step=Step(0), cursors={})
        with bench(config) as controller:
            assert controller.spec.order_sha256() != before
            assert (await controller.join_all(1, resume=resume)).first_step == 0
        # From now on the ledger knows the data by what it holds; the checkpoint does not.
        index = DatasetIndex.from_parquet(config.data.index.read_bytes())
        config.data.index.write_bytes(_moved(index, "/mnt/new").to_parquet())
        with bench(config) as controller, pytest.raises(Disagreement, match="order"):
            await controller.join_all(1, attempt="b", resume=resume)

    asyncio.run(scenario())
