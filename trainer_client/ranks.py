"""Which data-parallel rank this process is, and of how many."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed

from protos.errors import ConfigError
from protos.types import Rank


def resolve_rank(
    *, rank: int | None, world_size: int | None, environment: Mapping[str, str]
) -> tuple[Rank, int]:
    """Return rank and world size: from the arguments, torchrun's environment, or torch.distributed.

    Raises:
        ConfigError: none of them says both, or what they say makes no sense.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError(
            f"rank and world_size must be given together, got rank {rank} of {world_size}"
        )
    if rank is not None and world_size is not None:
        return _checked(rank, world_size, "the arguments of connect()")
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _from_environment(environment)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return _checked(*found, "torch.distributed")
    raise ConfigError(
        "rank and world size are not known: start the trainer with torchrun, initialise "
        "torch.distributed before connect(), or call connect(rank=0, world_size=1)"
    )


def _from_environment(environment: Mapping[str, str]) -> tuple[Rank, int]:
    texts = [environment.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    try:
        rank, world_size = (int(text) for text in texts)
    except ValueError:
        raise ConfigError(
            f"RANK and WORLD_SIZE must both be integers, got {texts[0]!r} and {texts[1]!r}: start "
            "the trainer with torchrun, or call connect(rank=..., world_size=...)"
        ) from None
    return _checked(rank, world_size, "the environment (RANK, WORLD_SIZE)")


def _checked(rank: int, world_size: int, source: str) -> tuple[Rank, int]:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(
            f"rank must be in 0..world_size-1, got rank {rank} of {world_size} from {source}"
        )
    return Rank(rank), world_size
