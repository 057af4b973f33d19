"""The gradient probe: how well the domains' gradients align, measured while the model trains."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from protos.errors import ConfigError
from protos.spec import ProbeSpec
from protos.types import Step
from trainer_client.batches import Batch
from trainer_client.device_copy import HostCopy
from trainer_client.layers import norm_layers, probe_layers
from trainer_client.norms import WeightNorms
from trainer_client.reduction import AlignmentPart, SketchReduction
from trainer_client.sketch import LayerSketch


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ProbeStep:
    """What the probe measured in a step, on its way to the host."""

    alignment: AlignmentPart | None
    norms: HostCopy | None
    probe_s: float


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
        layers = probe_layers(model, spec)
        devices = {layer.weight.device for layer in layers.values()}
        if len(devices) > 1:
            raise ConfigError(
                f"the watched layers {list(layers)} lie on several devices ({devices}); name "
                "layers of one device in the run file's probe.layers"
            )
        self.layer_names = tuple(layers)
        self._spec = spec
        self._device = devices.pop()
        self._batch: Batch | None = None
        self._probe_s = 0.0
        self._reduction = SketchReduction(world_size=world_size, device=self._device, ranks=ranks)
        self._sketches: list[LayerSketch] = []
        self._handles: list[RemovableHandle] = []
        for index, (name, layer) in enumerate(layers.items()):
            self._watch(index, name, layer, num_domains)
        watched = norm_layers(model) if norms else []
        self._norms = WeightNorms(watched, seed=spec.seed & (2**63 - 1)) if watched else None

    def _watch(self, index: int, name: str, layer: nn.Linear, num_domains: int) -> None:
        sketch = LayerSketch(
            spec=self._spec,
            num_domains=num_domains,
            layer_index=index,
            in_features=layer.in_features,
            out_features=layer.out_features,
            device=self._device,
        )
        self._sketches.append(sketch)

        def watch_forward(
            _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> None:
            # Outside training, and in the first of the two forward passes of reentrant
            # checkpointing, there is no gradient to come. The non-reentrant kind never
            # back-propagates into what it recomputes. So either way a token counts once.
            batch = self._batch
            if batch is None or not output.requires_grad:
                return
            begun = time.perf_counter()
            with torch.no_grad():
                projected = sketch.project_inputs(by_sequence(inputs[0], batch, name))
            self._probe_s += time.perf_counter() - begun

            def take_gradient(gradient: torch.Tensor) -> None:
                begun = time.perf_counter()
                with torch.no_grad():
                    gradient = by_sequence(gradient, batch, name)
                    sketch.add(gradient, projected, batch.domain_ids)
                self._probe_s += time.perf_counter() - begun

            output.register_hook(take_gradient)  # type: ignore[no-untyped-call]

        self._handles.append(layer.register_forward_hook(watch_forward))

    def measures(self, step: Step) -> bool:
        """Tell whether gradients are measured in a step; all ranks say the same."""
        return step % self._spec.every_n_steps == 0

    def begin(self, batch: Batch) -> None:
        """Say which micro-batch the model is about to see."""
        begun = time.perf_counter()
        if batch.first_of_step:
            self._probe_s = 0.0
            if self._norms is not None:
                self._norms.before_first_step()
            if self.measures(batch.step):
                for sketch in self._sketches:
                    sketch.begin(batch.step)
        self._batch = batch if self.measures(batch.step) else None
        self._probe_s += time.perf_counter() - begun

    def finish(self, step: Step, *, loss_scale: float) -> ProbeStep:
        """End a step after the optimizer's; starts the reduction over ranks and returns at once.

        Args:
            step: the step.
            loss_scale: what the gradient of a domain's summed token loss was multiplied by.
        """
        begun = time.perf_counter()
        self._batch = None
        alignment = None
        if self.measures(step):
            flat = torch.cat([sketch.sums.flatten(1) for sketch in self._sketches], dim=1)
            alignment = self._reduction.start(flat, scale=1 / loss_scale)
        norms = self._norms.after_step() if self._norms is not None else None
        probe_s = self._probe_s + time.perf_counter() - begun
        return ProbeStep(alignment=alignment, norms=norms, probe_s=probe_s)

    def close(self) -> None:
        """Take the hooks off; closing twice does no harm."""
        self._batch = None
        while self._handles:
            self._handles.pop().remove()


def by_sequence(hidden: torch.Tensor, batch: Batch, layer: str) -> torch.Tensor:
    """View hidden states [sequences, tokens, size] or [sequences * tokens, size] as the former.

    Raises:
        ConfigError: they are not of this micro-batch.
    """
    num_sequences = len(batch.domain_ids)
    if hidden.ndim == 3 and hidden.shape[0] == num_sequences:
        return hidden
    if hidden.ndim == 2 and hidden.shape[0] % num_sequences == 0:
        return hidden.reshape(num_sequences, -1, hidden.shape[1])
    raise ConfigError(
        f"the gradient probe cannot tell which hidden states of layer {layer} belong to which of "
        f"the micro-batch's {num_sequences} sequences: its shape is {tuple(hidden.shape)}; watch "
        "layers whose states lie sequence by sequence (probe.layers)"
    )
