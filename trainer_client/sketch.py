"""Per-domain gradients of a linear layer, or small random projections of them.

For inputs a (tokens x in) and output gradients d (tokens x out) a domain's gradient is the sum over
its tokens of d a^T. Its sketch is (dP)^T (aQ) with random P (out x p) and Q (in x q). If the means
of P P^T and Q Q^T are identities, inner products of sketches are unbiased estimates of inner
products of gradients. Three kinds of P and Q have that property: independent signs, independent
Gaussian entries, and random orthonormal columns, all scaled. Their errors are much alike (the
README has the table, `make bench-sketch` measures it); signs are the cheapest to draw.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from protos.keyed import raw_uint64
from protos.spec import ProbeSpec
from protos.types import Step


class LayerSketch:
    """[domains, p, q] sums for one weight and one step; fixed buffers, no synchronisation.

    They are gathered as the gradient of `accumulator`, a tensor that stands in no formula of the
    model (see `watch.Tap`): so whatever counts a parameter's gradient once counts them once.
    """

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
        self._drawn = False
        self.out_projection: torch.Tensor | None = None
        """P, [out, p]; None: gradients are taken whole"""

        self.in_projection: torch.Tensor | None = None
        """Q, [in, q]"""

        rows, columns = out_features, in_features
        if spec.mode == "sketch":
            rows, columns = spec.sketch_rows, spec.sketch_columns
            self.out_projection = torch.empty(out_features, rows, device=device)
            self.in_projection = torch.empty(in_features, columns, device=device)
        self.accumulator = torch.zeros(
            num_domains, rows, columns, device=device, requires_grad=True
        )
        self.parts: torch.Tensor | None = None
        """[domains], whose gradient gathers sequences' squared norms; None: nobody needs them"""

        if spec.part_norms:
            self.parts = torch.zeros(num_domains, device=device, requires_grad=True)

    @property
    def sums(self) -> torch.Tensor:
        """[domains, p, q]: what was added since `begin`."""
        if self.accumulator.grad is None:
            self.accumulator.grad = torch.zeros_like(self.accumulator)
        return self.accumulator.grad

    @property
    def part_squares(self) -> torch.Tensor:
        """[domains]: sequences' squared norms since `begin`, summed; only if `parts` is there."""
        assert self.parts is not None
        if self.parts.grad is None:
            self.parts.grad = torch.zeros_like(self.parts)
        return self.parts.grad

    def begin(self, step: Step) -> None:
        """Start a step: its projections, the same on every rank, and no sums."""
        self.sums.zero_()
        if self.parts is not None:
            self.part_squares.zero_()
        if self.out_projection is None or self.in_projection is None:
            return
        if self._drawn and self._spec.draw == "run":
            return
        self._drawn = True
        key = [self._spec.seed, self._layer_index]
        if self._spec.draw == "step":
            key.append(int(step))
        for name, buffer in (("out", self.out_projection), ("in", self.in_projection)):
            draw_projection(buffer, self._spec.projection, name, *key)


def draw_projection(buffer: torch.Tensor, kind: str, *key: int | str) -> None:
    """Fill [size, sketch_size] with a random P that depends on `key`; the mean of P P^T is I.

    Drawn on the host, so that ranks on different devices agree. A sketch that is as large as the
    layer needs no chance: P is the identity then, and the estimate exact.
    """
    size, sketch_size = buffer.shape
    if sketch_size >= size:
        buffer.copy_(torch.eye(size, sketch_size))
    elif kind == "sign":
        _fill(buffer, _signs(size, sketch_size, *key))
        buffer.mul_(sketch_size**-0.5)
    else:
        seed = int(raw_uint64(1, "sketch", *key)[0] >> 1)
        drawn = torch.randn(size, sketch_size, generator=torch.Generator().manual_seed(seed))
        scale = sketch_size**-0.5
        if kind == "orthonormal":
            # They span a uniformly random subspace, whatever signs the factorisation chooses.
            drawn, scale = torch.linalg.qr(drawn)[0], math.sqrt(size / sketch_size)
        _fill(buffer, drawn)
        buffer.mul_(scale)


def _signs(size: int, sketch_size: int, *key: int | str) -> torch.Tensor:
    count = size * sketch_size
    bits = np.unpackbits(raw_uint64(-(-count // 64), "sketch", *key).view(np.uint8), count=count)
    # One byte an entry: a quarter of what would have to be copied to a GPU as floats.
    return torch.from_numpy(bits.view(np.int8) * 2 - 1).view(size, sketch_size)


def _fill(buffer: torch.Tensor, drawn: torch.Tensor) -> None:
    if buffer.is_cuda:
        drawn = drawn.pin_memory().to(buffer.device, non_blocking=True)
    buffer.copy_(drawn)
