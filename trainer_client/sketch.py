"""Per-domain gradients of a linear layer, or small random projections of them.

For inputs a (tokens x in) and output gradients d (tokens x out) a domain's gradient is the sum over
its tokens of d a^T. Its sketch is (dP)^T (aQ) with random P (out x p) and Q (in x q). If the means
of P P^T and Q Q^T are identities, inner products of sketches are unbiased estimates of inner
products of gradients. Random orthonormal columns, scaled, have that property as independent
Gaussian entries have it, and less variance: a quarter less error at a width of 128 and p = q = 64,
none where p >= out and q >= in.
"""

from __future__ import annotations

import math

import torch

from protos.keyed import raw_uint64
from protos.spec import ProbeSpec
from protos.types import Step


class LayerSketch:
    """[domains, p, q] sums for one layer and one step; fixed buffers, no synchronisation."""

    def __init__(
        self,
        *,
        spec: ProbeSpec,
        num_domains: int,
        layer_index: int,
        in_features: int,
        out_features: int,
        device: torch.device,
    ) -> None:
        self._spec = spec
        self._layer_index = layer_index
        self._projections: tuple[torch.Tensor, torch.Tensor] | None = None
        rows, columns = out_features, in_features
        if spec.mode == "sketch":
            rows, columns = spec.sketch_rows, spec.sketch_columns
            self._projections = (
                torch.empty(out_features, rows, device=device),
                torch.empty(in_features, columns, device=device),
            )
        self.sums = torch.zeros(num_domains, rows, columns, device=device)

    def begin(self, step: Step) -> None:
        """Start a step: fresh projections, the same on every rank, and no sums."""
        self.sums.zero_()
        if self._projections is None:
            return
        seed = raw_uint64(1, self._spec.seed, "sketch", self._layer_index, int(step))[0]
        generator = torch.Generator().manual_seed(int(seed >> 1))
        for projection in self._projections:
            drawn = draw_projection(len(projection), projection.shape[1], generator)
            if projection.is_cuda:
                drawn = drawn.pin_memory()
            projection.copy_(drawn, non_blocking=True)

    def project_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [sequences, tokens, q] for inputs [sequences, tokens, in]."""
        if self._projections is None:
            return inputs.detach()
        return inputs.detach() @ self._projections[1].to(inputs.dtype)

    def add(
        self, gradients: torch.Tensor, projected_inputs: torch.Tensor, domain_ids: torch.Tensor
    ) -> None:
        """Add a micro-batch: output gradients [sequences, tokens, out], each sequence's domain."""
        if self._projections is not None:
            gradients = gradients @ self._projections[0].to(gradients.dtype)
        rows = torch.bmm(gradients.float().transpose(1, 2), projected_inputs.float())
        self.sums.index_add_(0, domain_ids, rows)


def draw_projection(size: int, sketch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random [size, sketch_size] matrix P; the mean of P P^T is the identity.

    Drawn on the host, so that ranks on different devices agree.
    """
    tall = (max(size, sketch_size), min(size, sketch_size))
    columns: torch.Tensor
    columns, _ = torch.linalg.qr(torch.randn(tall, generator=generator))
    if sketch_size >= size:
        return columns.T.contiguous()
    # They span a uniformly random subspace, whatever signs the factorisation chooses.
    return columns * math.sqrt(size / sketch_size)
