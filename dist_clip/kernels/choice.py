"""Which kernels do the work: an explicit argument, else the environment, else the best that is installed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

from torch import Tensor

from dist_clip.kernels import multi_tensor, torch_kernels

ENVIRONMENT = "DIST_CLIP_KERNELS"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A way to measure and scale lists of tensors.

    Attributes:
        name: "torch", "apex" or "transformer_engine".
        why: how it came to be chosen, for people.
        power_sums, scale_, zero_where_: as in `dist_clip.kernels.torch_kernels`.
    """

    name: str
    why: str
    power_sums: Callable[..., Tensor]
    scale_: Callable[..., None]
    zero_where_: Callable[..., None]


TORCH = Kernels("torch", "the default", torch_kernels.power_sums, torch_kernels.scale_, torch_kernels.zero_where_)


def choose(wanted: str | Kernels | None = None, order: Sequence[str] = ("torch",)) -> Kernels:
    """The kernels named `wanted`, else by the environment variable DIST_CLIP_KERNELS, else the first of `order` installed.

    Raises:
        TypeError, ValueError: no such kernels.
        ImportError: named explicitly, but not installed.
    """
    if isinstance(wanted, Kernels):
        return wanted
    if wanted is not None and not isinstance(wanted, str):
        raise TypeError(f"kernels must be a name, got {wanted!r}")
    if wanted is not None:
        return _named(wanted, "asked for by the argument")
    if os.environ.get(ENVIRONMENT):
        return _named(os.environ[ENVIRONMENT], f"asked for by {ENVIRONMENT}")
    for name in order:
        try:
            return _named(name, "the default" if len(order) == 1 else f"the first installed of {', '.join(order)}")
        except ImportError:
            continue
    return TORCH


def _named(name: str, why: str) -> Kernels:
    if name == "torch":
        return dataclasses.replace(TORCH, why=why)
    if name not in multi_tensor.LIBRARIES:
        raise ValueError(
            f"kernels must be one of 'torch', {', '.join(map(repr, multi_tensor.LIBRARIES))}, got {name!r}"
        )
    l2norm = multi_tensor.find(name)
    # Scales differ from tensor to tensor and live on the device, which neither library's scaling takes.
    return dataclasses.replace(TORCH, name=name, why=why, power_sums=multi_tensor.MultiTensorNorms(l2norm).power_sums)
