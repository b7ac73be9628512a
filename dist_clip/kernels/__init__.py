"""Norms and scales of many tensors at once. `torch_kernels` is the reference every other backend is tested against."""

from dist_clip.kernels.torch_kernels import power_sums, scale_, zero_where_

__all__ = ["power_sums", "scale_", "zero_where_"]
