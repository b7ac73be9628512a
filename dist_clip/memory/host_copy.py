"""A copy of a device tensor to the host, which is read later so that the host need not wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies a tensor to the host without waiting. Constructing it queues the copy on the device's stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._value = tensor
        if tensor.device.type == "cpu":
            self._value = tensor.clone()
        else:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value = host.copy_(tensor, non_blocking=True)
            self._event = torch.get_device_module(tensor.device.type).Event()
            self._event.record()

    @property
    def arrived(self) -> bool:
        """Whether `read` would return at once."""
        return self._event is None or bool(self._event.query())

    def read(self) -> Tensor:
        """Return the value on the CPU, and wait for it if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._value


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, during which the host may not read from the device."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
