"""Which kernels do the work: an explicit argument, else the environment, else the best that is installed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch
from torch import Tensor

from dist_clip.kernels import multi_tensor, torch_kernels

ENVIRONMENT = "DIST_CLIP_KERNELS"

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A way to measure and scale lists of tensors.

    Attributes:
        name: "torch", "triton", "apex" or "transformer_engine".
        why: how it came to be chosen, for people.
        power_sums, scale_, zero_where_: as in `dist_clip.kernels.torch_kernels`.
    """

    name: str
    why: str
    power_sums: Callable[..., Tensor]
    scale_: Callable[..., None]
    zero_where_: Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Preference:
    """What a framework would rather have, best first, where neither the user nor the environment says."""

    names: tuple[str, ...]


TORCH = Kernels("torch", "the default", torch_kernels.power_sums, torch_kernels.scale_, torch_kernels.zero_where_)
DEFAULT = Preference(("triton", "torch"))


def choose(wanted: str | Kernels | Preference | None = None, device: torch.device = _CPU) -> Kernels:
    """The kernels named `wanted`, else by the environment variable DIST_CLIP_KERNELS, else the first preferred that work.

    Args:
        wanted: a name, or a preference instead of `DEFAULT`. Kernels are returned as they are.
        device: where the gradients are. All but torch's are for CUDA devices, and not preferred elsewhere.

    Raises:
        TypeError, ValueError: no such kernels.
        ImportError: named explicitly, but not installed, or not able to run on `device`.
    """
    if isinstance(wanted, Kernels):
        return wanted
    if wanted is not None and not isinstance(wanted, (str, Preference)):
        raise TypeError(f"kernels must be a name, got {wanted!r}")
    if isinstance(wanted, str):
        return _named(wanted, "asked for by the argument", device)
    if os.environ.get(ENVIRONMENT):
        return _named(os.environ[ENVIRONMENT], f"asked for by {ENVIRONMENT}", device)
    names = [name for name in (wanted or DEFAULT).names if name == "torch" or device.type == "cuda"]
    if names in ([], ["torch"]):
        return TORCH
    passed_over = ""
    for name in names:
        try:
            return _named(name, f"the first installed of {', '.join(names)}{passed_over}", device)
        except ImportError as error:
            passed_over += f"; {error}"
    return dataclasses.replace(TORCH, why=f"none of {', '.join(names)} is installed{passed_over}")


def _named(name: str, why: str, device: torch.device) -> Kernels:
    if name == "torch":
        return dataclasses.replace(TORCH, why=why)
    if name == "triton":
        return _triton(why, device)
    if name not in multi_tensor.LIBRARIES:
        names = ", ".join(map(repr, ("torch", "triton", *multi_tensor.LIBRARIES)))
        raise ValueError(f"kernels must be one of {names}, got {name!r}")
    l2norm = multi_tensor.find(name)
    # Scales differ from tensor to tensor and live on the device, which neither library's scaling takes.
    return dataclasses.replace(TORCH, name=name, why=why, power_sums=multi_tensor.MultiTensorNorms(l2norm).power_sums)


def _triton(why: str, device: torch.device) -> Kernels:
    try:
        from dist_clip.kernels.triton_kernels import TritonKernels
    except ImportError as error:
        raise ImportError(f"kernels='triton': Triton cannot be imported ({error})") from error
    kernels = TritonKernels()
    try:
        kernels.try_on(device)
    except Exception as error:  # Triton's own or the driver's: no C compiler, a GPU or a driver that is too old
        raise ImportError(f"kernels='triton': installed, but fails on {device} ({error})") from error
    return Kernels("triton", why, kernels.power_sums, kernels.scale_, kernels.zero_where_)
