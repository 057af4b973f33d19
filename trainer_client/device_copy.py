"""Small device tensors on their way to the host, without making the device or the step wait."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray


class HostCopy:
    """A copy of a tensor as it is now; `wait` is for another thread than the trainer's."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        source = tensor.detach()
        if source.is_cuda:
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._copied = torch.cuda.current_stream(source.device).record_event()
        else:
            self._host = source.to("cpu", copy=True)

    def is_here(self) -> bool:
        """Say whether `wait` would return at once."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def wait(self) -> NDArray[Any]:
        """Return the values once they are here."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy()
