"""A run's configuration as a cluster gets it, and in what two of them differ."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from controller.config import RunConfig
from controller.config_cluster import WorkersSection
from controller.config_errors import first_sentence
from protos.errors import ConfigError
from protos.security import is_loopback, split_address

_WORKING_DIR = "/working_dir_files/"
"""In the paths of what `ray job submit --working-dir` unpacks, which Ray deletes some day."""

_ABSENT = object()


def for_cluster(config: RunConfig, *, workers: int | None, num_nodes: int) -> RunConfig:
    """Return a run as the actors are to get it: with absolute paths, checked for a cluster.

    Raises:
        ConfigError: it cannot be served on a cluster.
    """
    if split_address(config.address)[1] == 0:
        raise ConfigError(
            f"address: {config.address} gives the controller another port at every start, and "
            "trainers must find it again: name one, such as 0.0.0.0:7700"
        )
    if config.dashboard is not None and split_address(config.dashboard.address)[1] == 0:
        raise ConfigError(
            f"dashboard.address: {config.dashboard.address} gives the page another port whenever "
            "the controller is started again: name one, such as 127.0.0.1:7780"
        )
    if num_nodes > 1 and is_loopback(config.address):
        raise ConfigError(
            f"address: {config.address} reaches one node, and the cluster has {num_nodes}: write "
            f"address: 0.0.0.0:{split_address(config.address)[1]}, with security.tls and the token "
            "files (or security.insecure where the network is trusted)"
        )
    if workers is not None:
        config = config.model_copy(update={"workers": _counted(config.workers, workers)})
    config = _absolute(config)
    if _WORKING_DIR in str(config.out):
        raise ConfigError(
            f"out: {config.out} lies in what Ray unpacked for this job, and deletes some day: "
            "give an absolute path that stays"
        )
    return config


def _counted(workers: WorkersSection, count: int) -> WorkersSection:
    try:
        return WorkersSection.model_validate({**workers.model_dump(), "count": count})
    except ValidationError as error:
        reason = first_sentence(error, WorkersSection)
        raise ConfigError(f"--workers {count}: {reason}") from None


def _absolute(config: RunConfig) -> RunConfig:
    """Look relative paths up from here: on another node they would mean something else."""
    data = config.data
    domains = {
        name: domain.model_copy(update={"shards": tuple(map(_absolute_shard, domain.shards))})
        for name, domain in data.domains.items()
    }
    tokenizer = data.tokenizer.absolute() if data.tokenizer else None
    cache = config.workers.cache_dir
    return config.model_copy(
        update={
            "out": config.out.absolute(),
            "data": data.model_copy(
                update={
                    "index": data.index.absolute(),
                    "tokenizer": tokenizer,
                    "domains": domains,
                }
            ),
            "workers": config.workers.model_copy(
                update={"cache_dir": cache.absolute() if cache else None}
            ),
        }
    )


def _absolute_shard(shard: str) -> str:
    if "://" in shard or shard.startswith("pipe:"):
        return shard
    return os.path.abspath(shard)  # noqa: PTH100 - keeps links


def check_same(wanted: RunConfig, running: RunConfig) -> None:
    """Refuse to adopt a run that was started with another configuration.

    Raises:
        ConfigError: it was; each key that differs is named.
    """
    found = differences(wanted, running)
    if not found:
        return
    listed = "; ".join(
        f"{name}: {mine} in the file, {theirs} running" for name, mine, theirs in found
    )
    remedy = "`headrace down` first"
    if [name for name, _, _ in found] == ["workers.count"]:
        remedy = f"`headrace scale {wanted.workers.count}` changes that while it runs"
    raise ConfigError(
        f"run {wanted.run!r} is up with another configuration: {listed}; {remedy}, or give this "
        "run another name"
    )


def differences(wanted: RunConfig, running: RunConfig) -> list[tuple[str, str, str]]:
    """Return (dotted key, wanted value, running value) of all that differs, as JSON."""
    mine = dict(_leaves("", wanted.model_dump(mode="json")))
    theirs = dict(_leaves("", running.model_dump(mode="json")))
    return [
        (name, _shown(mine.get(name, _ABSENT)), _shown(theirs.get(name, _ABSENT)))
        for name in dict.fromkeys([*mine, *theirs])
        if mine.get(name, _ABSENT) != theirs.get(name, _ABSENT)
    ]


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


def _shown(value: object) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)
