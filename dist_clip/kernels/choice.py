"""The choice of the kernels: by an explicit argument, else by the environment, else the best that are installed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch
from torch import Tensor

from dist_clip.kernels import torch_kernels

ENVIRONMENT = "DIST_CLIP_KERNELS"

_CPU = torch.device("cpu")


def _as_it_is(shards: list[Tensor | None]) -> list[Tensor | None]:
    return shards


def _never(shards: list[Tensor | None]) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions that measure and scale lists of tensors.

    Attributes:
        name: "torch" or "triton".
        why: why they were chosen, for ``explain()``.
        power_sums, scale_, zero_where_: as in `dist_clip.kernels.torch_kernels`.
        read: returns a list of tensors with what these functions would otherwise find out of it at each call. It is good for
            one step, in which neither the list nor the tensors' memory may change.
        decide: decides a step in one launch, as `TritonKernels.decide` does; None: there is no such kernel.
        median_guard: decides whether a step is skipped, as `TritonKernels.median_guard` does; None: there is none.
        trusted: do not try `decide` and `median_guard` when a clipper is constructed.
        is_whole: whether `decide` may be used for what `read` returned.

    Example:
        >>> import dist_clip
        >>> clipper = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip(), kernels="torch")
    """

    name: str
    why: str
    power_sums: Callable[..., Tensor]
    scale_: Callable[..., None]
    zero_where_: Callable[..., None]
    read: Callable[[list[Tensor | None]], list[Tensor | None]] = _as_it_is
    decide: Callable[..., None] | None = None
    median_guard: Callable[..., None] | None = None
    trusted: bool = False
    is_whole: Callable[[list[Tensor | None]], bool] = _never


TORCH = Kernels("torch", "the default", torch_kernels.power_sums, torch_kernels.scale_, torch_kernels.zero_where_)


def choose(wanted: str | Kernels | None = None, device: torch.device = _CPU) -> Kernels:
    """Return the kernels that `wanted` names, else the environment variable DIST_CLIP_KERNELS, else the default.

    The default is Triton's kernels on CUDA devices where they work, else torch's.

    Args:
        wanted: "triton", "torch" or None. `Kernels` are returned as they are.
        device: where the gradients are.

    Raises:
        TypeError, ValueError: no such kernels.
        ImportError: kernels that were asked for by name are not installed or do not work on `device`.
    """
    if isinstance(wanted, Kernels):
        return wanted
    if wanted is not None and not isinstance(wanted, str):
        raise TypeError(f"kernels must be a name, got {wanted!r}")
    if wanted is not None:
        return _named(wanted, "asked for by the argument", device)
    if os.environ.get(ENVIRONMENT):
        return _named(os.environ[ENVIRONMENT], f"asked for by {ENVIRONMENT}", device)
    if device.type != "cuda":
        return TORCH
    try:
        return _triton("the default on CUDA", device)
    except ImportError as error:
        return dataclasses.replace(TORCH, why=f"Triton's do not work here: {error}")


def _named(name: str, why: str, device: torch.device) -> Kernels:
    if name == "torch":
        return dataclasses.replace(TORCH, why=why)
    if name == "triton":
        return _triton(why, device)
    raise ValueError(f"kernels must be 'triton' or 'torch', got {name!r}")


def _triton(why: str, device: torch.device) -> Kernels:
    try:
        from dist_clip.kernels.triton_kernels import TritonKernels
    except ImportError as error:
        raise ImportError(f"kernels='triton': Triton cannot be imported ({error})") from error
    kernels = TritonKernels()
    try:
        kernels.try_on(device)
    except Exception as error:  # Triton and the driver raise many classes: no C compiler, a GPU or driver too old, ...
        raise ImportError(f"kernels='triton': installed, but fails on {device} ({error})") from error
    return Kernels(
        "triton",
        why,
        kernels.power_sums,
        kernels.scale_,
        kernels.zero_where_,
        kernels.read,
        kernels.decide,
        kernels.median_guard,
        is_whole=kernels.is_whole,
    )
