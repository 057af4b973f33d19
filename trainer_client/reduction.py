"""From every rank's sketches to every rank's part of the alignment matrix."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from protos.errors import ConfigError
from trainer_client.device_copy import HostCopy

# Renamed in torch 2.13; the old name warns.
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


class AlignmentPart:
    """A rank's K x K part of the inner products, on its way; `wait` on the reporter's thread."""

    def __init__(
        self, chunk: torch.Tensor, *, scale: float, share: float, work: dist.Work | None
    ) -> None:
        self.share = share
        self._scale = scale
        self._chunk = chunk
        self._work = work
        self._gram: HostCopy | None = None
        if work is None:
            self._gram = HostCopy(gram(chunk, scale))
        elif chunk.is_cuda:
            self._gram = self._gram_on_side_stream(work)

    def _gram_on_side_stream(self, work: dist.Work) -> HostCopy:
        # The device waits for the collective, the trainer's own stream and the host do not.
        side = torch.cuda.Stream(self._chunk.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            work.wait()
            return HostCopy(gram(self._chunk, self._scale))

    def wait(self, *, timeout_s: float) -> NDArray[Any]:
        """Return the [domains, domains] part.

        Raises:
            RuntimeError: the other ranks' sketches did not come in time.
        """
        if self._gram is None:
            assert self._work is not None
            self._work.wait(datetime.timedelta(seconds=timeout_s))
            self._gram = HostCopy(gram(self._chunk, self._scale))
        return self._gram.wait()


class SketchReduction:
    """Adds the ranks' sketches up, each rank getting its share of the coordinates.

    It has a process group of its own, since it runs beside the trainer's collectives: on gloo for
    a model on the CPU, on NCCL for one on CUDA. Calls are made on the trainer's thread, in step
    order, so that all ranks make the same ones; nothing there waits for them.
    """

    def __init__(self, *, world_size: int, device: torch.device, ranks: list[int] | None) -> None:
        self._world_size = world_size
        self._index = 0
        self._group: dist.ProcessGroup | None = None
        if world_size == 1:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                f"the gradient probe adds sketches up over {world_size} ranks, for which it needs "
                "torch.distributed: call init_process_group() before session.probe()"
            )
        num_members = dist.get_world_size() if ranks is None else len(ranks)
        if num_members != world_size:
            raise ConfigError(
                f"the session has {world_size} data-parallel ranks, but the process group given to "
                f"the probe has {num_members}: pass the global ranks of this data-parallel group "
                "as session.probe(model, ranks=[...])"
            )
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Ranks of other data-parallel groups (of tensor-parallel peers) name other members.
        group = dist.new_group(ranks, backend=backend, use_local_synchronization=ranks is not None)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._index = dist.get_group_rank(group, dist.get_rank())

    def start(self, sketches: torch.Tensor, *, scale: float) -> AlignmentPart:
        """Begin to reduce [domains, coordinates] sketches; returns at once.

        Args:
            sketches: this rank's; not changed, and free to be changed afterwards.
            scale: factor that turns them into sketches of the summed token losses' gradients.
        """
        num_domains, num_coordinates = sketches.shape
        if self._group is None:
            return AlignmentPart(sketches.clone(), scale=scale, share=1.0, work=None)
        chunk_size = -(-num_coordinates // self._world_size)
        padding = chunk_size * self._world_size - num_coordinates
        padded = torch.nn.functional.pad(sketches, (0, padding))
        by_rank = padded.view(num_domains, self._world_size, chunk_size).transpose(0, 1)
        chunk = torch.empty(num_domains, chunk_size, dtype=sketches.dtype, device=sketches.device)
        work = _reduce_scatter(
            chunk.view(-1), by_rank.reshape(-1), group=self._group, async_op=True
        )
        held = min(chunk_size, max(num_coordinates - self._index * chunk_size, 0))
        return AlignmentPart(chunk, scale=scale, share=held / num_coordinates, work=work)


def gram(chunk: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the inner products of the rows, in float64."""
    exact = chunk.double() * scale
    return exact @ exact.T
