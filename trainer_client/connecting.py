"""How a trainer comes by its session."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from protos.errors import ConfigError
from protos.security import Security
from trainer_client.peers import Peers, places
from trainer_client.ranks import resolve_rank
from trainer_client.session import Session
from trainer_client.step_log import LogFn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def connect(
    address: str,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    run_id: str | None = None,
    global_sequences: int | None = None,
    sequence_length: int | None = None,
    resume: Mapping[str, Any] | None = None,
    mesh: DeviceMesh | None = None,
    data_axes: Sequence[str] | None = None,
    group: ProcessGroup | None = None,
    timeout_s: float = 60.0,
    delivery_log: Path | None = None,
    security: Security | None = None,
    log_fn: LogFn | None = None,
) -> Session:
    """Join the run as a data-parallel rank; returns when all ranks are there.

    Args:
        address: the controller's `host:port`.
        rank: this process; by default from torchrun's environment or torch.distributed.
        world_size: of how many.
        run_id: refuse any other run; by default HEADRACE_RUN_ID, else whichever the controller has.
        global_sequences: refuse a run with another number of sequences in a step.
        sequence_length: refuse a run with another length.
        resume: what `Session.state_dict` returned, or `merge_states` of all ranks.
        mesh: the trainer's whole DeviceMesh, with named dimensions: rank and world size are those
            along its data-parallel dimensions, and the ranks along the others (tensor, pipeline,
            context) get the same rows. All ranks of the mesh call `connect`.
        data_axes: names of the mesh's data-parallel dimensions, if they do not begin like `dp`.
        group: without a mesh, the ranks that must get the same rows, this one among them; `rank`
            and `world_size` are then the data-parallel ones.
        timeout_s: how long to wait for the controller, its workers and the other ranks.
        delivery_log: folder for a line about each sequence received; None: no log.
        security: the files by which to talk to controller and workers; by default those that
            HEADRACE_CA, HEADRACE_JOIN_TOKEN_FILE, HEADRACE_CERT, HEADRACE_KEY and
            HEADRACE_SERVER_NAME name.
        log_fn: hears of each step's losses, shares and times on this rank, in the background; see
            `trainer_client.integrations.logs` for TensorBoard, W&B, Trackio and MLflow.

    Raises:
        ControllerUnreachable: nobody answers at `address`.
        JoinTimeout: not all ranks came in time.
        Disagreement: ranks, or a rank and the run, differ in a setting, or `resume` is of another
            order of the data.
        NotAuthenticated: the controller does not know the token, or none was given.
        ConfigError: rank, world size, address or `resume` are wrong in themselves.
    """
    # Here and not above, so that importing trainer_client does not import grpc.
    from protos.client import ControlClient
    from trainer_client.joining import Wanted

    peers, data_ranks = _places(mesh, data_axes, group)
    if mesh is not None and data_ranks is not None:
        if rank is not None or world_size is not None:
            raise ConfigError("give connect() either rank and world_size, or a mesh, not both")
        rank, world_size = data_ranks.index(dist.get_rank()), len(data_ranks)
    found_rank, found_world_size = resolve_rank(
        rank=rank, world_size=world_size, environment=os.environ
    )
    wanted = Wanted(
        rank=found_rank,
        world_size=found_world_size,
        run_id=os.environ.get("HEADRACE_RUN_ID", "") if run_id is None else run_id,
        global_sequences=global_sequences or 0,
        sequence_length=sequence_length or 0,
        timeout_s=timeout_s,
        security=security or Security.from_environment(os.environ),
    )
    control = ControlClient(address, security=wanted.security)
    try:
        return Session(
            control,
            wanted,
            resume=resume,
            delivery_log=delivery_log,
            peers=peers,
            data_ranks=data_ranks,
            log_fn=log_fn,
        )
    except BaseException:
        control.close()
        raise


def _places(
    mesh: DeviceMesh | None, data_axes: Sequence[str] | None, group: ProcessGroup | None
) -> tuple[Peers | None, list[int] | None]:
    """Return who shares this rank's rows, and the global ranks of its data-parallel group."""
    if mesh is not None:
        sharing, data_ranks = places(mesh, data_axes)
        return (Peers(sharing) if len(sharing) > 1 else None), data_ranks
    if group is None:
        return None, None
    sharing = dist.get_process_group_ranks(group)
    return (Peers(sharing) if len(sharing) > 1 else None), None
