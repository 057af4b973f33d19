"""Where a run's actors live on a Ray cluster: names, placement groups, and finding them again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from controller.config import RunConfig
from controller.config_cluster import ClusterSection
from deploy.node_actors import ControllerOnNode, LoaderOnNode
from loader_workers.worker import WorkerSettings
from protos.errors import NotReady

CONTROLLER = "controller"
KEEPER = "keeper"

_WORKER = re.compile(r"worker-(\d+)")
_HEAD = {"node:__internal_head__": 0.001}
"""Ray gives this resource to the head node."""

_GONE = ("REMOVED",)


def not_placed(name: str, timeout_s: float) -> NotReady:
    """Return what to say of an actor of the head node that does not start."""
    return NotReady(
        f"no node took the {name} within {timeout_s:g} s: it stays on the head node, or where "
        "cluster.controller_labels say; `ray status` shows what is there"
    )


def namespace(run: str) -> str:
    """Return the namespace of a run's actors: its own."""
    return f"headrace/{run}"


def run_of(namespace_of_actor: str) -> str | None:
    """Return the run that a namespace belongs to; None: it is none of ours."""
    prefix, slash, run = namespace_of_actor.partition("/")
    return run if slash and prefix == "headrace" else None


def detached(run: str, name: str) -> dict[str, Any]:
    """Return the options of an actor that outlives whoever made it, and is made only once.

    A call that was under way when it died is never made again by Ray: whoever made it does so.
    """
    return {
        "name": name,
        "namespace": namespace(run),
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": 0,
    }


def beside_head(cluster: ClusterSection) -> dict[str, Any]:
    """Return the options that keep controller and keeper on one node, also over restarts."""
    if cluster.controller_labels:
        return {"num_cpus": 0, "label_selector": dict(cluster.controller_labels)}
    return {"num_cpus": 0, "resources": _HEAD}


def actors_of(run: str) -> dict[str, Any]:
    """Return the actors that a run has on the cluster, by name."""
    found = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == namespace(run):
            # One may end between the two calls.
            with contextlib.suppress(ValueError):
                found[entry["name"]] = ray.get_actor(entry["name"], namespace=namespace(run))
    return found


def runs_on_cluster() -> list[str]:
    """Return the names of all runs that have a keeper on the cluster."""
    names = ray.util.list_named_actors(all_namespaces=True)
    runs = {run_of(each["namespace"]) for each in names if each["name"] == KEEPER}
    return sorted(run for run in runs if run is not None)


def worker_numbers(names: Sequence[str]) -> list[int]:
    """Return the numbers of those names that are workers'."""
    found = (_WORKER.fullmatch(name) for name in names)
    return sorted(int(match.group(1)) for match in found if match)


def controller_of(config: RunConfig) -> Any:
    """Return the run's controller, made if it is not there yet."""
    options = {**detached(config.run, CONTROLLER), **beside_head(config.cluster)}
    return ControllerOnNode.options(**options, max_concurrency=4).remote(config)


class Places:
    """Placement groups for a run's workers: one for those that start together.

    A group's name says which workers it is for, so that they are found again.
    """

    def __init__(self, run: str, cluster: ClusterSection) -> None:
        self._prefix = f"{namespace(run)}: workers "
        self._cluster = cluster
        self._groups: dict[tuple[int, ...], PlacementGroup] = {}
        for name in self._names():
            numbers = tuple(map(int, name.removeprefix(self._prefix).split(",")))
            with contextlib.suppress(ValueError):
                self._groups[numbers] = get_placement_group(name)

    def _names(self) -> list[str]:
        groups = ray.util.placement_group_table().values()
        return [
            group["name"]
            for group in groups
            if group["name"].startswith(self._prefix) and group["state"] not in _GONE
        ]

    @classmethod
    def remove_all(cls, run: str) -> int:
        """Give back all groups that a run has; return how many they were."""
        groups = cls(run, ClusterSection())._groups
        for group in groups.values():
            ray.util.remove_placement_group(group)
        return len(groups)

    def expect(self, numbers: Sequence[int]) -> None:
        """Ask for places for those workers that have none."""
        missing = tuple(number for number in numbers if self._find(number) is None)
        if not missing:
            return
        cluster = self._cluster
        bundle = {"CPU": cluster.worker_cpus, **cluster.worker_resources}
        labels = [dict(cluster.worker_labels)] * len(missing) if cluster.worker_labels else None
        self._groups[missing] = placement_group(
            # Ray refuses a bundle that takes nothing at all.
            [{name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}]
            * len(missing),
            strategy=cluster.placement.upper(),
            name=self._prefix + ",".join(map(str, missing)),
            lifetime="detached",
            bundle_label_selector=labels,
        )

    def of(self, number: int) -> PlacementGroupSchedulingStrategy:
        """Return the place of a worker that was expected."""
        numbers = self._find(number)
        assert numbers is not None, "a place is asked for before a worker is made"
        return PlacementGroupSchedulingStrategy(
            self._groups[numbers], placement_group_bundle_index=numbers.index(number)
        )

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is room for all; say whether there is."""
        return all(group.wait(timeout_s) for group in self._groups.values())

    def release(self, staying: Sequence[int]) -> None:
        """Give back the groups that hold none of the workers that stay."""
        for numbers in [each for each in self._groups if not set(each) & set(staying)]:
            ray.util.remove_placement_group(self._groups.pop(numbers))

    def _find(self, number: int) -> tuple[int, ...] | None:
        return next((numbers for numbers in self._groups if number in numbers), None)


class ClusterMaker:
    """Makes workers as detached, named actors in placement groups, or takes up those there are."""

    def __init__(self, config: RunConfig, places: Places) -> None:
        self._config = config
        self._places = places
        self._made: set[int] = set()

    def expect(self, numbers: Sequence[int]) -> None:
        """See `WorkerMaker`."""
        self._places.expect(numbers)

    def make(self, number: int, settings: WorkerSettings) -> Any:
        """See `WorkerMaker`."""
        cluster = self._config.cluster
        self._made.add(number)
        return LoaderOnNode.options(
            **detached(self._config.run, settings.worker_id),
            num_cpus=cluster.worker_cpus,
            resources=dict(cluster.worker_resources) or None,
            scheduling_strategy=self._places.of(number),
            # `start` may wait for the controller; `log` is answered meanwhile.
            max_concurrency=4,
        ).remote(settings)

    def gone(self, number: int) -> None:
        """See `WorkerMaker`."""
        self._made.discard(number)
        self._places.release(sorted(self._made))
