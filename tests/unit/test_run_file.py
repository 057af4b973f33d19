"""A run file that asks for something impossible gets one sentence: where, what, what instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.config import RunConfig, load_run_file
from controller.policy.base import Statistic
from controller.prepare import prepare
from protos.dataset_index import DatasetIndex, ShardRef
from protos.errors import (
    ConfigError,
    DataError,
    DomainEmpty,
    HeadraceError,
    IndexMismatch,
    TokenizerInvalid,
    TooMuchLost,
    UnknownDomain,
)
from tests.fakes_controller import ACODM, DOMAINS, run_document, small_run, write_index


def _load(folder: Path, document: dict[str, Any]) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_run_file(path)


def _with(folder: Path, key: str, value: object) -> dict[str, Any]:
    """Return a run file with one dotted key set, or taken out if the value is `...`."""
    document = run_document(folder)
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return document


def test_a_run_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    config = _load(tmp_path, run_document(tmp_path))
    assert tuple(config.data.domains) == DOMAINS
    assert (config.control.lag, config.probe.sketch_rows, config.workers.count) == (2, 64, 2)
    assert config.ledger_path == tmp_path / "out" / "ledger.sqlite"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("polcy", 1, r"unknown key polcy; did you mean policy\? Allowed here: run, seed"),
        ("batch.lane", 4, r"unknown key batch\.lane; did you mean lanes\?"),
        ("policy.mixtur", {}, r"unknown key policy\.mixtur; did you mean mixture\?"),
        ("data.domains.web.zzz", 1, r"data\.domains\.web\.zzz; allowed here: shards"),
        ("guard.max_epoch", 1, r"guard\.max_epoch; did you mean max_epochs\?"),
        ("steps", ..., r"key steps is missing"),
        ("policy.name", ..., r"key policy\.name is missing"),
        ("policy.name", "acdm", r"policy\.name is 'acdm'; it must be one of 'static', 'natural'"),
        ("policy.mixture.web", -0.5, r"policy\.mixture: the share of domain 'web' .* got -0\.5"),
        ("batch.lanes", "eight", r"batch\.lanes must be a whole number, got 'eight'"),
        ("batch.lanes", True, r"batch\.lanes must be a whole number, got True"),
        ("batch.lanes", 3, r"global_sequences must be a multiple of lanes = 3, got 8"),
        ("batch.interleave", 3, r"window_samples must be a multiple of interleave = 3, got 8"),
        ("batch.packing", "knapsack", r"packing must be 'concatenate' or 'best_fit', got 'knap"),
        ("batch", None, r"batch must be a mapping of keys, got None"),
        ("control.lag", 0, r"control\.lag must be greater than or equal to 1, got 0"),
        ("control.report_grace_s", float("nan"), r"report_grace_s must be a finite number"),
        ("data.domains", {}, r"data\.domains must have at least one entry"),
        ("data.domains.web.shards", [], r"data\.domains\.web\.shards must have at least one"),
        ("data.domains.web.shards", "a.tar", r"web\.shards must be a list, got 'a\.tar'"),
        ("data.vocab_size", ..., r"data\.vocab_size and data\.eot_id must be set"),
        ("data.eot_id", 300, r"eot_id must be below vocab_size = 300, got 300"),
        ("data.max_bad_share", 2, r"data\.max_bad_share must be less than or equal to 1, got 2"),
        ("guard.min_share", -1, r"guard\.min_share must be greater than or equal to 0, got -1"),
        (
            "probe.projection",
            "hadamard",
            r"probe\.projection must be 'sign', 'gaussian' or 'orthonormal', got 'hadamard'",
        ),
        ("probe.draw", "day", r"probe\.draw must be 'step' or 'run', got 'day'"),
        ("probe.mode", "guess", r"probe\.mode must be 'sketch' or 'exact', got 'guess'"),
        ("policy", {"name": "replay_mean"}, r"key policy\.from is missing"),
        (
            "policy",
            {"name": "replay_mean", "from": "x", "form": 1},
            r"unknown key policy\.form; did you mean from\?",
        ),
        (
            "policy",
            {"name": "ado", "smoothing_window": 6},
            r"policy\.smoothing_window: smoothing_window must be odd, got 6",
        ),
        (
            "policy",
            {"name": "skillit", "graph": "x", "graph_steps": 3},
            r"policy: graph_steps has no effect where graph is given",
        ),
        ("shadows", [{"name": "odm"}, {"name": "magic"}], r"shadows\.1\.name is 'magic'; it must"),
        (
            "shadows",
            [{"name": "odm", "smoothin": 1}],
            r"unknown key shadows\.0\.smoothin; did you mean smoothing\?",
        ),
        ("shadows", {"name": "odm"}, r"shadows must be a list"),
        ("address", "7700", r"address: an address must be HOST:PORT .* got '7700'"),
        ("address", "0.0.0.0:7700", r"binding 0\.0\.0\.0:7700 .* security\.insecure"),
    ],
)
def test_what_is_wrong_in_a_run_file_is_said_in_one_sentence(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _load(tmp_path, _with(tmp_path, key, value))
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path}/run.yaml: ")
    assert "\n" not in sentence


def test_a_schedule_that_would_begin_too_late_is_refused(tmp_path: Path) -> None:
    points = [{"step": step, "mixture": {DOMAINS[0]: 1.0}} for step in (0, 2)]
    document = _with(tmp_path, "policy", {"name": "schedule", "points": points})
    _load(tmp_path, document)
    document["control"] = {"lag": 3}
    with pytest.raises(ConfigError, match=r"control\.lag = 3 or later .* got 2"):
        _load(tmp_path, document)


def test_an_address_beyond_this_machine_may_be_asked_for(tmp_path: Path) -> None:
    document = _with(tmp_path, "address", "0.0.0.0:7700")
    document["security"] = {"insecure": True}
    assert _load(tmp_path, document).wire_security.insecure


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [1", "not valid YAML: .* on line 1"),
        ("- run", "must be a mapping of keys, got list"),
        ("", "must be a mapping of keys, got NoneType"),
        ("run: a\nrun: b", "key 'run' is given twice, the second time on line 2"),
        ("run: !!python/object/apply:os.getpid []", "not valid YAML: could not determine"),
    ],
)
def test_a_file_that_is_no_run_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_run_file(path)


def test_a_run_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_run_file(tmp_path / "none.yaml")


def _prepare_error(config: RunConfig, kind: type[HeadraceError]) -> str:
    with pytest.raises(kind) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    assert not config.out.exists()
    return str(caught.value)


def test_a_missing_index_says_how_to_build_it(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    config.data.index.unlink()
    assert "headrace index" in _prepare_error(config, IndexMismatch)


def test_an_index_of_other_domains_is_refused_with_both(tmp_path: Path) -> None:
    config = small_run(
        tmp_path, data={"domains": {"web": {"shards": ["a"]}}}, policy={"name": "uniform"}
    )
    message = _prepare_error(config, IndexMismatch)
    assert "web, code, books, the run web" in message


def test_a_domain_with_fewer_samples_than_lanes_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path / "index.parquet", num_samples=3)
    message = _prepare_error(small_run(tmp_path), DomainEmpty)
    assert "domain 'web' has 3 samples" in message
    assert "4 lanes" in message


def test_a_mixture_of_a_domain_that_the_run_has_not_is_refused(tmp_path: Path) -> None:
    config = small_run(tmp_path, policy={"name": "static", "mixture": {"wbe": 1.0}})
    assert "wbe" in _prepare_error(config, UnknownDomain)


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    config = small_run(tmp_path, data={"tokenizer": str(path)})
    assert "data.tokenizer" in _prepare_error(config, TokenizerInvalid)
    path.write_text("{}")
    assert str(path) in _prepare_error(config, TokenizerInvalid)


def test_an_index_with_too_many_unreadable_shards_is_refused(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    good = DatasetIndex.from_parquet(config.data.index.read_bytes())
    torn = ShardRef(
        domain="web",
        url="torn.tar",
        num_bytes=9_000,
        num_samples=0,
        text_bytes=0,
        sha256="",
        quarantined="it ends in the middle of a sample",
    )
    shards = [shard for name in DOMAINS for shard in good.shards(name)]
    config.data.index.write_bytes(DatasetIndex([*shards, torn]).to_parquet())
    message = _prepare_error(config, TooMuchLost)
    assert "torn.tar: it ends in the middle" in message
    assert issubclass(TooMuchLost, DataError)


def test_trainers_measure_gradients_only_for_a_policy_that_needs_them(tmp_path: Path) -> None:
    assert prepare(small_run(tmp_path)).spec.probe is None
    prepared = prepare(small_run(tmp_path, policy=ACODM, probe={"sketch_rows": 8}))
    assert Statistic.ALIGNMENT in prepared.policy.needs
    assert prepared.spec.probe is not None
    assert (prepared.spec.probe.sketch_rows, prepared.spec.probe.seed) == (8, 7)


def test_packing_is_part_of_the_order_of_the_data(tmp_path: Path) -> None:
    joined = prepare(small_run(tmp_path)).spec
    best_fit = prepare(small_run(tmp_path, batch={"packing": "best_fit"})).spec
    assert (joined.packing, best_fit.packing) == ("concatenate", "best_fit")
    assert joined.order_sha256() != best_fit.order_sha256()
