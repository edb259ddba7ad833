"""Values on their way between host and device, without either waiting for the other.

On a GPU both directions go through page-locked memory of torch's caching host allocator, which hands a piece
out again only when the copies recorded on it are over. On the CPU nothing moves and all is there at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class HostCopy:
    """A device tensor's values in host memory, there once `event` has fired."""

    values: Tensor
    event: torch.cuda.Event | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> "HostCopy":
        """Start copying, behind what the current stream was given so far; later work may change the tensor.

        On the CPU it is the tensor itself, which must not change.
        """
        if not tensor.is_cuda:
            return cls(tensor)
        values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        values.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(values, event)

    def is_done(self) -> bool:
        """Whether `read` would not wait."""
        return self.event is None or self.event.query()

    def read(self) -> Tensor:
        """The values; waits for them."""
        if self.event is not None:
            self.event.synchronize()
        return self.values


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The values on the device, behind what the current stream was given; the host goes on at once."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
