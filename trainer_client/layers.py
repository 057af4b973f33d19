"""Which layers of a model are watched."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

from torch import nn

from protos.errors import ConfigError
from protos.spec import ProbeSpec

NORM_DEPTHS = (0, 2, 4, 6, 8, 10, 12, 14, 16)
"""Sixteenths of the model's depth at which weight norms are taken: the first layer and, in a model
of 16, the even ones. As many in any other model, so that a policy can move between models."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def probe_layers(model: nn.Module, spec: ProbeSpec) -> dict[str, nn.Linear]:
    """Return the linear layers whose gradients are sketched, by name, in the model's order.

    Raises:
        ConfigError: there are none, or one of them cannot be watched.
    """
    linears = _linears(model)
    if spec.layers:
        chosen = _matching(linears, spec.layers)
    else:
        names = _last_linear_of_blocks(model, linears)
        depths = _depths(len(names), [16 - 2 * back for back in range(spec.num_layers)])
        chosen = {names[depth]: linears[names[depth]] for depth in sorted(set(depths))}
    for name, layer in chosen.items():
        _check_watchable(model, name, layer)
    # Layers that are tied to one another have one gradient, which the first of them stands for.
    first_of = {id(layer.weight): name for name, layer in reversed(chosen.items())}
    return {name: layer for name, layer in chosen.items() if first_of[id(layer.weight)] == name}


def norm_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the layers at NORM_DEPTHS, with repeats in a shallow model; none if it has no blocks.

    Each is the last linear layer of its block, as in AC-ODM.
    """
    linears = _linears(model)
    try:
        names = _last_linear_of_blocks(model, linears)
    except ConfigError:
        return []
    found = [max(math.ceil(depth * len(names) / 16) - 1, 0) for depth in NORM_DEPTHS]
    return [linears[names[index]] for index in found]


def _depths(num_blocks: int, sixteenths: list[int]) -> list[int]:
    """Return a block for each relative depth, deepest first; neighbours move up where two meet."""
    found: list[int] = []
    for depth in sixteenths:
        index = max(math.ceil(depth * num_blocks / 16) - 1, 0)
        if found and index >= found[-1]:
            index = found[-1] - 1
        if index < 0:
            break
        found.append(index)
    return found


def _plain(name: str) -> str:
    """Return a module's name without what DDP, torch.compile and their like put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        _plain(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _matching(linears: dict[str, nn.Linear], patterns: tuple[str, ...]) -> dict[str, nn.Linear]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            some = ", ".join(list(linears)[:5]) or "none"
            raise ConfigError(
                f"probe.layers: {pattern!r} matches no nn.Linear of the model, which has e.g. "
                f"{some}; write a pattern that matches one"
            )
    return {
        name: layer
        for name, layer in linears.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _last_linear_of_blocks(model: nn.Module, linears: dict[str, nn.Linear]) -> list[str]:
    lists = {
        _plain(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not lists:
        raise ConfigError(
            "the model has no nn.ModuleList of repeated blocks to choose layers from: name the "
            "layers to watch in the run file's probe.layers"
        )
    # A block may hold a longer list of its own, of experts for instance.
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = max(outermost, key=lambda name: len(lists[name]))
    found = []
    for index in range(len(lists[blocks])):
        block = f"{blocks}.{index}"
        inside = [name for name in linears if name == block or name.startswith(f"{block}.")]
        if not inside:
            raise ConfigError(
                f"block {block} of the model has no nn.Linear: name the layers to watch "
                "in the run file's probe.layers"
            )
        found.append(inside[-1])
    return found


def _check_watchable(model: nn.Module, name: str, layer: nn.Linear) -> None:
    if not layer.weight.requires_grad:
        raise ConfigError(
            f"layer {name} is frozen, so it has no gradient to watch: name other layers in the "
            "run file's probe.layers"
        )
    for user_name, user in users_of_weight(model, layer).items():
        if isinstance(user, nn.Embedding) and not (user.sparse or user.scale_grad_by_freq):
            continue
        if not isinstance(user, nn.Linear):
            raise ConfigError(
                f"layer {name} shares its weight with {user_name}, a {type(user).__name__}, so its "
                "own inputs and outputs do not give the whole gradient: name other layers in the "
                "run file's probe.layers"
            )


def users_of_weight(model: nn.Module, layer: nn.Linear) -> dict[str, nn.Module]:
    """Return every module that holds the layer's weight, by name: tied layers are several."""
    return {
        _plain(name): module
        for name, module in model.named_modules()
        if any(parameter is layer.weight for parameter in module.parameters(recurse=False))
    }
