"""An indexing that was interrupted goes on; shards are read in parallel; policies on damage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from controller.config import RunConfig, parse_run
from deploy.parallel import choose, in_processes, on_ray
from loader_workers.index import Mapper, build_index
from loader_workers.index_partial import ScannedShard
from loader_workers.scan import ShardToScan
from protos.dataset_index import DatasetIndex
from protos.errors import ConfigError, TooMuchLost
from protos.spec import QUARANTINE_SHARD, SKIP_SAMPLE, STOP
from tests.fakes_loader import random_documents, shard_bytes, write_text_shards


class _Interrupted(Exception):
    pass


class _Counting:
    """A mapper that counts shards, and stops after some."""

    def __init__(self, *, stop_after: int = 1000) -> None:
        self.urls: list[str] = []
        self._stop_after = stop_after

    def __call__(
        self,
        function: Callable[[ShardToScan], ScannedShard],
        items: Sequence[ShardToScan],
    ) -> Iterable[ScannedShard]:
        for item in items:
            if len(self.urls) == self._stop_after:
                raise _Interrupted
            self.urls.append(item.url)
            yield function(item)


def _index(folder: Path, mapper: Mapper | None, *, text_field: str = "text") -> DatasetIndex:
    return build_index(
        {"web": [str(folder / "web" / "*.tar")]},
        text_field=text_field,
        max_bad_share=0,
        samples_folder=folder / "index.samples",
        partial=folder / "index.partial.jsonl",
        mapper=mapper,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text_shards(tmp_path, "web", random_documents(1, 60), num_shards=6)
    return tmp_path


def _interrupt(folder: Path) -> None:
    with pytest.raises(_Interrupted):
        _index(folder, _Counting(stop_after=4))
    assert (folder / "index.partial.jsonl").exists()


def test_an_interrupted_indexing_goes_on_and_gives_the_same_index(folder: Path) -> None:
    whole = _index(folder, None)
    assert not (folder / "index.partial.jsonl").exists()
    _interrupt(folder)
    rest = _Counting()
    assert _index(folder, rest).to_parquet() == whole.to_parquet()
    assert [Path(url).name for url in rest.urls] == ["0004.tar", "0005.tar"]
    assert not (folder / "index.partial.jsonl").exists()


def test_a_shard_that_changed_meanwhile_is_read_again(folder: Path) -> None:
    _interrupt(folder)
    changed = folder / "web" / "0001.tar"
    changed.write_bytes(changed.read_bytes() + bytes(512))
    rest = _Counting()
    _index(folder, rest)
    assert [Path(url).name for url in rest.urls] == ["0001.tar", "0004.tar", "0005.tar"]


def test_lines_that_are_torn_or_of_other_settings_do_not_count(folder: Path) -> None:
    _interrupt(folder)
    partial = folder / "index.partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:-20])
    with pytest.raises(_Interrupted):
        _index(folder, _Counting(stop_after=0))
    rest = _Counting()
    _index(folder, rest)
    assert [Path(url).name for url in rest.urls] == ["0003.tar", "0004.tar", "0005.tar"]
    _interrupt(folder)
    everything = _Counting()
    _index(folder, everything, text_field="body")
    assert len(everything.urls) == 6


@pytest.mark.slow
def test_shards_are_read_in_other_processes_with_the_same_result(folder: Path) -> None:
    assert _index(folder, in_processes(2)).to_parquet() == _index(folder, None).to_parquet()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_shards_are_read_on_ray_with_the_same_result(folder: Path) -> None:
    assert _index(folder, on_ray("local")).to_parquet() == _index(folder, None).to_parquet()


def test_one_process_or_one_item_needs_no_other_process() -> None:
    from deploy.parallel import in_turn

    assert choose(1, processes=0, ray_address=None) is in_turn
    assert choose(9, processes=1, ray_address=None) is in_turn
    assert list(in_processes(4)(str, [1])) == ["1"]


def test_a_ray_cluster_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster at 'nowhere'"):
        list(choose(3, processes=0, ray_address="nowhere")(str, [1, 2]))


def _with_one_bad(folder: Path, on_damage: str) -> DatasetIndex:
    (folder / "bad").mkdir()
    for shard in range(2):
        samples = [
            {"__key__": str(n), "txt": b"\xff" if (shard, n) == (1, 3) else b"fine"}
            for n in range(10)
        ]
        (folder / "bad" / f"{shard}.tar").write_bytes(shard_bytes(samples))
    return build_index(
        {"web": [str(folder / "bad" / "*.tar")]},
        text_field="text",
        max_bad_share=0.6,
        on_damage=on_damage,
    )


def test_a_bad_sample_is_left_out_by_default(tmp_path: Path) -> None:
    assert _with_one_bad(tmp_path, SKIP_SAMPLE).num_samples("web") == 20


def test_a_bad_sample_costs_its_shard_if_so_chosen(tmp_path: Path) -> None:
    sound, lost = _with_one_bad(tmp_path, QUARANTINE_SHARD).shards("web")
    assert sound.num_samples == 10
    assert "sample '3': its text is not UTF-8" in lost.quarantined


def test_a_bad_sample_stops_everything_if_so_chosen(tmp_path: Path) -> None:
    with pytest.raises(TooMuchLost, match=r"1 of 20 samples .* and data.on_damage is stop; the fi"):
        _with_one_bad(tmp_path, STOP)


def _config(**data: object) -> RunConfig:
    return parse_run(
        {
            "run": "r",
            "steps": 1,
            "out": "out",
            "data": {
                "index": "runs/index.parquet",
                "vocab_size": 10,
                "eot_id": 0,
                "domains": {"web": {"shards": ["x.tar"]}},
                **data,
            },
            "batch": {"global_sequences": 8, "sequence_length": 8},
            "policy": {"name": "uniform"},
        },
        source="run.yaml",
    )


def test_the_run_file_says_what_is_done_about_damage() -> None:
    assert _config().bad_limit == 0.01
    assert _config(on_damage="stop", max_bad_share=0.5).bad_limit == 0
    assert _config().data.samples_folder == Path.cwd() / "runs" / "index.samples"
    with pytest.raises(ConfigError, match="on_damage"):
        _config(on_damage="ignore")
