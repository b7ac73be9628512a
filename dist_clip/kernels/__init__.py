"""Norms and scales of many tensors at once. `torch_kernels` is the reference that tests compare other kernels with."""

from dist_clip.kernels.choice import TORCH, Kernels, choose

__all__ = ["TORCH", "Kernels", "choose"]
