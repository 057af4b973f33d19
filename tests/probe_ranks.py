"""What each of four ranks does to hold the probe against autograd, for every way to wrap a model.

Run by torchrun; writes one file a rank, which `test_probe_on_ranks` reads.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from protos.errors import ConfigError
from protos.spec import ProbeSpec
from tests.fakes_model import TinyModel, make_batches, summed_loss
from trainer_client import Batch, GradientProbe

NUM_DOMAINS = 4
MIXES = ([[0, 1, 2], [2, 0]], [[3, 3, 1], [1, 2]], [[0, 0, 0], [3, 1]], [[1, 2, 3], [3, 3]])
"""A data-parallel rank, a micro-batch, a sequence's domain."""

WHOLE = ProbeSpec(sketch_rows=24, sketch_columns=24, layers=("blocks.*",))
"""As large as the layers, so that the sketch is exact."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to wrap a model for four ranks."""

    wrap: Callable[[nn.Module, DeviceMesh], nn.Module]
    tensor_parallel: bool = False
    checkpointing: str = ""
    autocast: bool = False
    spec: ProbeSpec = WHOLE


def _ddp(model: nn.Module, _: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model)


def _compiled_ddp(model: nn.Module, _: DeviceMesh) -> nn.Module:
    compiled: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    return compiled  # type: ignore[no-any-return]


def _fsdp(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh["dp"], **options)
    fully_shard(model, mesh=mesh["dp"], **options)
    return model


def _bf16_fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return _fsdp(model, mesh, mp_policy=policy)


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(
            block,
            mesh["tp"],
            {"up": ColwiseParallel(), "down": RowwiseParallel()},
        )
    return model


def _tensor_parallel_fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return _fsdp(_tensor_parallel(model, mesh), mesh)


CASES = {
    "ddp": Case(wrap=_ddp),
    "ddp exact": Case(wrap=_ddp, spec=ProbeSpec(mode="exact")),
    "ddp autocast": Case(wrap=_ddp, autocast=True),
    "ddp reentrant": Case(wrap=_ddp, checkpointing="reentrant"),
    "ddp compiled": Case(wrap=_compiled_ddp),
    "fsdp": Case(wrap=_fsdp),
    "fsdp bf16": Case(wrap=_bf16_fsdp),
    "fsdp checkpointing": Case(wrap=_fsdp, checkpointing="non-reentrant"),
    "tensor parallel": Case(wrap=_tensor_parallel, tensor_parallel=True),
    "tensor parallel fsdp": Case(wrap=_tensor_parallel_fsdp, tensor_parallel=True),
}


def batches_of(data_rank: int) -> list[Batch]:
    """Return the micro-batches of a data-parallel rank."""
    return make_batches(MIXES[data_rank], seed=data_rank)


def start_model(checkpointing: str = "") -> TinyModel:
    """Return the model that all begin with."""
    torch.manual_seed(0)
    return TinyModel(checkpointing=checkpointing)


@contextmanager
def _accumulating(model: nn.Module, more: bool) -> Iterator[None]:
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more)
        yield
    elif more and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def measure(case: Case, mesh: DeviceMesh) -> dict[str, NDArray[Any]]:
    """Train a step; return this rank's part of the alignment, norms, and the gradient of a bias."""
    model = case.wrap(start_model(case.checkpointing), mesh)
    data_mesh = mesh["dp"]
    members = dist.get_process_group_ranks(data_mesh.get_group())
    probe = GradientProbe(
        model,
        spec=case.spec,
        num_domains=NUM_DOMAINS,
        world_size=data_mesh.size(),
        ranks=members,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = batches_of(data_mesh.get_local_rank())
    half = torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext()
    for batch in batches:
        probe.begin(batch)
        with _accumulating(model, not batch.last_of_step):
            with half:
                loss = summed_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    found = probe.finish(batches[0].step, loss_scale=1.0)
    assert found.alignment is not None
    assert found.norms is not None
    part = found.alignment.wait(timeout_s=20)
    probe.close()
    return {
        "part": part,
        "share": np.array(found.alignment.share),
        "norms": found.norms.wait(),
        "reports": np.array(mesh["tp"].get_local_rank() == 0 if case.tensor_parallel else True),
    }


def refuse_sequence_parallel(mesh: DeviceMesh) -> str:
    """Return how the probe refuses a layer whose output is spread over tokens."""
    from torch.distributed.tensor import Shard

    model = start_model()
    parallelize_module(
        model.blocks[0],
        mesh["tp"],
        {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Shard(1))},
    )
    spec = ProbeSpec(sketch_rows=4, sketch_columns=4, layers=("blocks.0.down",))
    probe = GradientProbe(model, spec=spec, num_domains=NUM_DOMAINS, norms=False)
    probe.begin(batches_of(0)[0])
    try:
        model.blocks[0](torch.zeros(3, 6, 12, requires_grad=True))
    except ConfigError as error:
        return str(error)
    finally:
        probe.close()
    return ""


def main(folder: Path) -> None:
    """Measure every case."""
    dist.init_process_group("gloo")
    flat = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "tp"))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found: dict[str, NDArray[Any]] = {}
    for name, case in CASES.items():
        measured = measure(case, square if case.tensor_parallel else flat)
        found |= {f"{name}/{key}": value for key, value in measured.items()}
    found["refusal"] = np.array(refuse_sequence_parallel(square))
    np.savez(folder / f"rank{dist.get_rank()}.npz", **found)  # type: ignore[arg-type]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
