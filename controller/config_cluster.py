"""Sections of a run file for whoever starts processes: how many workers, and where on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from controller.config_section import Section

Count = Annotated[int, Field(strict=True, ge=1)]
Amount = Annotated[float, Field(ge=0)]


class WorkersSection(Section):
    """Loader workers, for whoever starts them."""

    count: Count = 2
    """How many there are at the start."""

    min: Count | None = None
    """With `max`: `headrace up` adds and takes away workers, by how long ranks wait for data."""

    max: Count | None = None
    grow_after_s: Annotated[float, Field(gt=0)] = 15.0
    """Within the bounds: how long ranks must have waited, for more than 5% of their time."""

    shrink_after_s: Annotated[float, Field(gt=0)] = 120.0
    """And how long they must have waited for less than 0.5% before a worker goes."""

    cache_dir: Path | None = None
    cache_bytes: Count = 10_000_000_000
    threads: Count = 1

    @model_validator(mode="after")
    def _bounds_hold_the_count(self) -> WorkersSection:
        if (self.min is None) != (self.max is None):
            raise ValueError("min and max go together: without either, workers stay as many")
        least, most = self.min or self.count, self.max or self.count
        if not least <= self.count <= most:
            raise ValueError(
                f"count must lie between min = {least} and max = {most}, got {self.count}"
            )
        return self


class ClusterSection(Section):
    """Where on a Ray cluster `headrace up` puts the run; nothing else reads it."""

    placement: Literal["spread", "pack", "strict_spread"] = "spread"
    """Workers on as many nodes as there are (`strict_spread`: one a node, or none), or on few."""

    worker_cpus: Amount = 1.0
    """What a worker takes of a node's CPUs in Ray's books."""

    worker_resources: dict[str, Amount] = {}
    """What else it takes of a node, by the name that `ray start --resources` gave it."""

    worker_labels: dict[str, str] = {}
    """Labels (`ray start --labels`) that the nodes of workers must have."""

    controller_labels: dict[str, str] = {}
    """Labels that the controller's node must have; none: it stays on the head node."""
