"""The gradient probe: how well the domains' gradients align, measured while the model trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from protos.errors import ConfigError
from protos.spec import NORMS_ONLY, ProbeSpec
from protos.types import Step
from trainer_client.batches import Batch
from trainer_client.device_copy import HostCopy
from trainer_client.layers import norm_layers, probe_layers, users_of_weight
from trainer_client.norms import WeightNorms
from trainer_client.reduction import AlignmentPart, SketchReduction
from trainer_client.sketch import LayerSketch
from trainer_client.taps import EmbeddingTap, LinearTap, make_tap
from trainer_client.watch import Clock, Tap

ForwardHook = Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ProbeStep:
    """What the probe measured in a step, on its way to the host."""

    alignment: AlignmentPart | None
    norms: HostCopy | None
    part_squares: HostCopy | None = None
    """[domains]: squared norms of the sequences' gradients, summed over the sequences."""

    lacks_parts: bool = False
    """They are wanted, but sequences cannot be told apart: they hold several domains, or a watched
    layer is tensor-parallel."""

    probe_s: float
    """Host seconds; what torch.compile compiled into the model is not in it."""


class GradientProbe:
    """Watches a few linear layers; `Session.probe` makes it and the session drives it.

    It must be made before torch.compile compiles the model, and after the model is on its device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        spec: ProbeSpec,
        num_domains: int,
        world_size: int = 1,
        ranks: list[int] | None = None,
        norms: bool = True,
    ) -> None:
        # Where no gradients are asked for, no layer is watched and nothing is added up over ranks.
        layers = {} if spec.mode == NORMS_ONLY else probe_layers(model, spec)
        devices = {layer.weight.device for layer in layers.values()}
        if len(devices) > 1:
            raise ConfigError(
                f"the watched layers {list(layers)} lie on several devices ({devices}); name "
                "layers of one device in the run file's probe.layers"
            )
        self.layer_names = tuple(layers)
        self._spec = spec
        self._device = next(iter(devices), torch.device("cpu"))
        self._num_domains = num_domains
        self._domain_ids: torch.Tensor | None = None
        self._mixed = False
        self._graph_ids: dict[torch.Size, torch.Tensor] = {}
        self._clock = Clock()
        self._reduction: SketchReduction | None = None
        if layers:
            self._reduction = SketchReduction(
                world_size=world_size, device=self._device, ranks=ranks
            )
        self._sketches: list[LayerSketch] = []
        self._taps: list[tuple[LayerSketch, LinearTap | EmbeddingTap]] = []
        self._handles: list[RemovableHandle] = []
        for index, (name, layer) in enumerate(layers.items()):
            self._watch(index, name, layer, model)
        watched = norm_layers(model) if norms else []
        self._norms = WeightNorms(watched, seed=spec.seed & (2**63 - 1)) if watched else None

    def _watch(self, index: int, name: str, layer: nn.Linear, model: nn.Module) -> None:
        sketch = LayerSketch(
            spec=self._spec,
            num_domains=self._num_domains,
            layer_index=index,
            in_features=layer.in_features,
            out_features=layer.out_features,
            device=self._device,
        )
        self._sketches.append(sketch)
        users = users_of_weight(model, layer)
        if self._spec.part_norms and len(users) > 1:
            raise ConfigError(
                f"layer {name} shares its weight with {', '.join(set(users) - {name})}, so that "
                "the policy's norms of each sequence's gradient cannot be measured: name other "
                "layers in the run file's probe.layers"
            )
        for user_name, user in users.items():
            tap = make_tap(sketch, user, user_name or name)
            self._taps.append((sketch, tap))
            self._handles.append(user.register_forward_hook(self._hook(tap)))

    def _hook(self, tap: LinearTap | EmbeddingTap) -> ForwardHook:
        def tap_output(
            _: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
        ) -> torch.Tensor | None:
            # Outside training, and in the first of the two forward passes of reentrant
            # checkpointing, there is no gradient to come. The non-reentrant kind never
            # back-propagates into what it recomputes. So either way a token counts once.
            domain_ids = self._domain_ids
            if domain_ids is None or not output.requires_grad:
                return None
            if torch.compiler.is_compiling():
                return self._tap(tap, inputs, output, domain_ids, None)
            begun = time.perf_counter()
            tapped = self._tap(tap, inputs, output, domain_ids, self._clock)
            self._clock.elapsed_s += time.perf_counter() - begun
            return tapped

        return tap_output

    def _tap(
        self,
        tap: LinearTap | EmbeddingTap,
        inputs: tuple[Any, ...],
        output: torch.Tensor,
        domain_ids: torch.Tensor,
        clock: Clock | None,
    ) -> torch.Tensor:
        with torch.no_grad():
            watched = tap.watch(inputs, output, domain_ids)
        tapped: torch.Tensor = Tap.apply(  # type: ignore[no-untyped-call]
            output,
            watched.sketch.accumulator,
            watched.sketch.parts,
            watched.kept,
            watched.projection,
            domain_ids,
            watched.kept_is_rows,
            clock,
        )
        return tapped

    def measures(self, step: Step) -> bool:
        """Tell whether gradients are measured in a step; all ranks say the same."""
        return self._reduction is not None and step % self._spec.every_n_steps == 0

    def begin(self, batch: Batch) -> None:
        """Say which micro-batch the model is about to see."""
        begun = time.perf_counter()
        if batch.first_of_step:
            self._clock.elapsed_s = 0.0
            if self._norms is not None:
                self._norms.before_first_step()
            self._mixed = False
            if self.measures(batch.step):
                for sketch in self._sketches:
                    sketch.begin(batch.step)
        self._mixed = self._mixed or batch.domain_ids.ndim != 1
        self._domain_ids = self._held(batch.domain_ids) if self.measures(batch.step) else None
        self._clock.elapsed_s += time.perf_counter() - begun

    def _held(self, domain_ids: torch.Tensor) -> torch.Tensor:
        """Return the ids where a CUDA graph that was captured with others of that shape looks."""
        if not domain_ids.is_cuda:
            return domain_ids
        held = self._graph_ids.setdefault(domain_ids.shape, torch.empty_like(domain_ids))
        return held.copy_(domain_ids)

    def finish(self, step: Step, *, loss_scale: float) -> ProbeStep:
        """End a step after the optimizer's; starts the reduction over ranks and returns at once.

        Args:
            step: the step.
            loss_scale: what the gradient of a domain's summed token loss was multiplied by.
        """
        begun = time.perf_counter()
        self._domain_ids = None
        alignment = parts = None
        if self._reduction is not None and self.measures(step):
            parts = self._part_squares(loss_scale)
            self._add_tensor_parallel_parts()
            flat = torch.cat([sketch.sums.flatten(1) for sketch in self._sketches], dim=1)
            alignment = self._reduction.start(flat, scale=1 / loss_scale)
        norms = self._norms.after_step() if self._norms is not None else None
        probe_s = self._clock.elapsed_s + time.perf_counter() - begun
        return ProbeStep(
            alignment=alignment,
            norms=norms,
            probe_s=probe_s,
            part_squares=parts,
            lacks_parts=self._spec.part_norms and self.measures(step) and parts is None,
        )

    def _part_squares(self, loss_scale: float) -> HostCopy | None:
        """Return the [domains] squared norms of the sequences' gradients, as far as known."""
        spread = any(tap.tensor_mesh is not None for _, tap in self._taps)
        if not self._spec.part_norms or spread or self._mixed:
            return None
        squares = torch.stack([sketch.part_squares for sketch in self._sketches]).double().sum(0)
        return HostCopy(squares / loss_scale**2)

    def _add_tensor_parallel_parts(self) -> None:
        for sketch, tap in self._taps:
            if tap.tensor_mesh is not None:
                dist.all_reduce(sketch.sums, group=tap.tensor_mesh.get_group())

    def close(self) -> None:
        """Take the hooks off; closing twice does no harm."""
        self._domain_ids = None
        while self._handles:
            self._handles.pop().remove()
